"""A model decoding through the runtime: tokens per second, memory and fetches, full attention beside LSA.

    python -m benchmarks.runtime --bundle runs/pocket/bundle --model recipes/pocket_v4/model --prompt PROMPT.jsonl
    python -m benchmarks.runtime --bundle runs/long/bundle --model FILE.gguf --recipe gemma-3-270m-long --length 32768
    ... --graph 1 8 [--compile] [--dtype bfloat16]

--model is what a recipe's `backbone.path` may be. The prompt is the first `input` of a RULER file, or text that the
recipe holds out, of as many tokens as make up --length with those after it. Rows: everything resident; LSA with the
torch backend at lag 0 and 1; the same with Triton, where it computes the bundle. All read what full attention wrote
after the prompt, and time is that of decoding alone, from the first window to the last token's logits,
with notes of what each window asked and chose taken on the way.

`windows_as_cpu` counts windows whose set equals that of the torch backend on the CPU, from the same hidden states and
keys; `windows_as_torch` those that equal the torch row's of the same lag, whose hidden states may differ once a set
did; `times_full`: tokens a second over those with everything resident; `peak_mb`: GPU memory while decoding, the model
included; `resident_mb`: the largest window's; `fetched_mb_a_window`: without the first, which follows a full prompt.
`state_ms`, of the first row: what a call of `generate` takes to see whether the weights are those of the turn before;
`state_tokens`: how many tokens that is.

--graph has other rows: of each number of sequences, with everything resident and with --budget, the runtime as it is
(eager) and the one whose step a GPU replays as a CUDA graph; on a CPU the same step runs without one. The prompts are
one prompt begun at other places. The eager runtime goes on from its own choice, and the step reads the same tokens.
`tokens_per_second`: of all sequences together; `times_eager`: over those of the eager row; `tokens_as_eager`: the share
of tokens that both would write; `windows_as_eager`: windows with the same sets; `times_full`: over the row of the same
kind with everything resident. --compile adds rows of a captured step whose norms and MLPs torch has compiled.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import origin
from benchmarks.timing import microseconds
from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig
from data_gen.core.errors import InputError
from data_gen.text.documents import heldout_share
from eval.online.generated import Haystack
from eval.runtime.calls import model_state
from eval.runtime.hosts.resident import Move, Prepared
from eval.runtime.runtime import LSARuntime
from eval.serving.level1 import Backend, Level1
from indexer_train.formats.bundle import load_bundle
from indexer_train.selection import Budget
from recipes import load_recipe

SLACK = 1.1
"""Times the tokens wanted that are drawn: paragraphs may take fewer tokens together than one by one."""


@dataclass(frozen=True)
class Windows:
    """What a run chose. asked: hidden states [B, L, hidden] and positions [B] of each choice; chosen: chunks of each
    window, sequence after sequence; keys: [N, L, width] of all chunks of the first sequence, at the end; tokens:
    [B, T + 1], what it would write after each token read, from the untimed one on."""

    asked: list[tuple[torch.Tensor, torch.Tensor]]
    chosen: list[torch.Tensor]
    keys: torch.Tensor
    tokens: torch.Tensor


def decode(
    runtime: LSARuntime, ids: torch.Tensor, tokens: int, follow: torch.Tensor | None = None
) -> tuple[dict[str, Any], Windows]:
    """Read the prompts ids [B, S] and a token, then time reading more: `follow` [B, T], or those that it writes itself.

    Returns figures, and what every window kept.
    """
    runtime.reset()
    # The second token's step is compiled and captured on the way.
    written = runtime.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)[:, -1:]
    asked, chosen, keep, queries = [], [], runtime.host.keep, runtime.level1.pack

    def note_keep(resident: Sequence[torch.Tensor] | Prepared) -> Move:
        chosen.append(torch.cat(list(resident.resident if isinstance(resident, Prepared) else resident)))
        return keep(resident)

    def note_queries(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append((hidden.clone(), positions))
        return queries(hidden, positions)

    runtime.host.keep, runtime.level1.pack = note_keep, note_queries
    if ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started, windows = time.perf_counter(), len(runtime.windows)
    runtime.cycle.refresh()
    with runtime.host.attached(), torch.no_grad():
        for step in range(tokens):
            if step:
                runtime.cycle.advance()
            token = written[:, -1:] if follow is None else follow[:, step : step + 1]
            written = torch.cat([written, runtime.host.read(token).argmax(dim=-1, keepdim=True)], dim=1)
    written = written.cpu()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 1e6 if ids.is_cuda else None
    del runtime.host.keep, runtime.level1.pack
    done = runtime.windows[windows:]
    figures = {
        "prompt_tokens": ids.shape[1],
        "tokens": tokens,
        "tokens_per_second": len(ids) * tokens / seconds,
        "peak_mb": peak,
        "resident_share": sum(w.resident for w in done) / sum(len(ids) * w.chunks for w in done),
        "resident_mb": max(w.bytes for w in done) / 1e6,
        "fetched_mb_a_window": sum(w.fetched_bytes for w in done[1:]) / max(1, len(done) - 1) / 1e6,
    }
    return figures, Windows(asked, chosen, runtime.host.keys()[0].cpu(), written)


def as_cpu(runtime: LSARuntime, reference: Level1, windows: Windows) -> str:
    """How many windows kept what `reference`, on the CPU, asks for."""
    right = 0
    for (hidden, positions), chosen in zip(windows.asked, windows.chosen, strict=False):
        seen = windows.keys[: runtime.spec.chunking.visible(int(positions))]
        wanted = reference.resident(reference.pack(hidden.cpu(), positions.cpu()), seen)
        right += torch.equal(wanted.row(0).long(), chosen.long().cpu())
    return f"{right} of {len(windows.chosen)}"


def measure(
    model: PreTrainedModel, bundle: Path, ids: torch.Tensor, tokens: int, budget: float
) -> list[dict[str, Any]]:
    """A row for everything resident, and one for `budget` with every backend that computes the bundle, at each lag."""
    rows: list[dict[str, Any]] = []
    by_torch: dict[int, list[torch.Tensor]] = {}
    whole = model.generate(ids, max_new_tokens=tokens + 1, do_sample=False, eos_token_id=None)  # pyright: ignore[reportCallIssue] - of a mixin that PreTrainedModel lacks
    written = whole[:, ids.shape[1] + 1 :]
    kinds: list[tuple[float, Backend, Literal[0, 1]]]
    kinds = [(1.0, "torch", 0), *((budget, backend, lag) for backend in ("torch", "triton") for lag in (0, 1))]
    for share, backend, lag in kinds:
        selection = Budget(budget=share)
        try:
            runtime = LSARuntime(load_bundle(bundle), model, selection=selection, backend=backend, lag=lag)
        except InputError as error:
            if backend == "torch":
                raise
            print(f"no row for Triton at lag {lag}: {error}")
            continue
        found, windows = decode(runtime, ids, tokens, written)
        row = {"budget": share, "backend": backend, "lag": lag, **found}
        row["times_full"] = found["tokens_per_second"] / (rows[0] if rows else found)["tokens_per_second"]
        row["windows_as_cpu"] = as_cpu(
            runtime, Level1(load_bundle(bundle).to("cpu"), runtime.limits, selection), windows
        )
        if backend == "triton":
            pairs = list(zip(by_torch[lag], windows.chosen, strict=True))
            row["windows_as_torch"] = f"{sum(torch.equal(a, b) for a, b in pairs)} of {len(pairs)}"
        elif rows:
            by_torch[lag] = windows.chosen
        else:
            row["state_ms"] = microseconds(lambda: model_state(model), ids.device) / 1e3
            row["state_tokens"] = row["state_ms"] / 1e3 * row["tokens_per_second"]
        rows.append(row)
        print(json.dumps(row))
    return rows


def measure_graph(
    model: PreTrainedModel, bundle: Path, ids: torch.Tensor, tokens: int, budget: float, batches: list[int], fuse: bool
) -> list[dict[str, Any]]:
    """Of each number of sequences, with everything resident and with `budget`, a row for eager reading, one for a
    captured step and, with `fuse`, one for a captured step of the model with compiled norms and MLPs."""
    kinds = {"eager": (model, False), "graph": (model, True), **({"compiled": (compiled(model), True)} if fuse else {})}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        prompts = torch.cat([ids.roll(place * ids.shape[1] // batch, dims=1) for place in range(batch)])
        full: dict[str, float] = {}
        for share in (1.0, budget):
            eager: tuple[dict[str, Any], Windows] | None = None
            for kind, (reader, graph) in kinds.items():
                runtime = LSARuntime(load_bundle(bundle), reader, selection=Budget(budget=share), graph=graph)
                found, windows = decode(runtime, prompts, tokens, eager and eager[1].tokens.to(ids.device))
                eager, speed = eager or (found, windows), found["tokens_per_second"]
                pairs = list(zip(eager[1].chosen, windows.chosen, strict=True))
                row = {
                    "kind": kind, "batch": batch, "dtype": str(model.dtype).removeprefix("torch."), "budget": share,
                    **found,
                    "times_eager": speed / eager[0]["tokens_per_second"],
                    "times_full": speed / full.setdefault(kind, speed),
                    "tokens_as_eager": (windows.tokens == eager[1].tokens).float().mean().item(),
                    "windows_as_eager": f"{sum(torch.equal(a, b) for a, b in pairs)} of {len(pairs)}",
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
                del runtime  # its cache, before the next one's
    return rows


def compiled(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose norms and MLPs, a dozen small kernels each, are compiled when they are first called."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "MLP")):
            module.compile()
    return model


def heldout_text(recipe: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> torch.Tensor:
    """Ids [1, tokens] of text that the recipe holds out. Raises InputError when it has less."""
    documents = load_recipe(recipe).documents
    wanted = int(tokens * SLACK)
    share = heldout_share(documents)
    haystack = Haystack(documents.source, documents.text_field, share, tokenizer, wanted, documents.bad_rows)
    text = "\n\n".join(haystack.draw(random.Random(0), wanted))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise InputError(f"--length: the text drawn has {ids.shape[1]} tokens, not {tokens}; ask for another length")
    return ids


def main() -> None:
    """Print a row for each way to decode; --output: the same with its origin, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a folder, a hub id, a .gguf file, package:NAME/FILE or tiny")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=Path, help="a RULER file")
    prompt.add_argument("--length", type=int, help="tokens of held-out text, with --recipe; those decoded are counted")
    parser.add_argument("--recipe", help="whose held-out text is read")
    parser.add_argument("--tokens", type=int, default=192, help="tokens decoded")
    parser.add_argument("--budget", type=float, default=0.13)
    parser.add_argument("--graph", type=int, nargs="+", metavar="B", help="rows of a captured step, for B sequences")
    parser.add_argument("--compile", action="store_true", help="with --graph: compiled norms and MLPs, too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.compile and not arguments.graph:
        parser.error("--compile adds rows to those of --graph; give that as well")
    if (arguments.length is None) != (arguments.recipe is None):
        parser.error("--length and --recipe go together")
    if arguments.length is not None and arguments.length < arguments.tokens + 3:
        parser.error(
            f"--length: of {arguments.length} tokens {arguments.tokens} are decoded; three must be left to read"
        )
    model, tokenizer = load_backbone(BackboneConfig(path=arguments.model, dtype=arguments.dtype))
    if arguments.prompt:
        with open(arguments.prompt) as file:
            ids = tokenizer(json.loads(file.readline())["input"], return_tensors="pt").input_ids
    else:
        ids = heldout_text(arguments.recipe, tokenizer, arguments.length - arguments.tokens - 1)
    if (longest := ids.shape[1] + arguments.tokens + 1) > (context := adapter(model).info.context):
        parser.error(f"{longest} tokens with those decoded, but the backbone's context is {context}; ask for fewer")
    where = origin(model.device)
    print(f"{where['device']}; {ids.shape[1]} tokens read, {arguments.tokens} behind them")
    setting = model, arguments.bundle, ids.to(model.device), arguments.tokens, arguments.budget
    with torch._dynamo.config.patch(recompile_limit=64):  # one norm's code serves every width, prompt and batch
        rows = measure_graph(*setting, arguments.graph, arguments.compile) if arguments.graph else measure(*setting)
    if arguments.output:
        arguments.output.write_text(json.dumps({"origin": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
