"""Which architectures of transformers can be traced and decoded: tiny random models of all of them, against the truth.

    python -m benchmarks.models --write docs/models.md

`traced`: chunk probabilities are the model's own eager attention weights, pooled. `decoded`: with everything resident
logits are those of the stock model, bit for bit; with 50, 20 and 6 % of the chunks resident those of the stock model
whose full-attention layers are masked. Each holds for several seeds, on prompts of more than 20 chunks. `refused`: what
`lookahead` says when such a model is opened.
"""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.tiny_models import class_of, classes, families, tiny
from data_gen.backbones.dsa_hooks import indexers
from data_gen.backbones.layers import attention_modules, caches_latents
from data_gen.backbones.load import Backbone, adapter
from data_gen.backbones.observe import AttentionCall, observe
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from data_gen.traces.types import SparseAttention
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dsa import DsaHost

SEEDS = (0, 1, 2)
CHUNK, PROMPT = 4, 90
"""Tokens of a chunk and of a prompt: 22 chunks and two tokens more."""
SHARES = (0.5, 0.2, 0.06)
PIECES = (1, 1, 1, 3, 1)
"""Tokens read at once after the prompt."""
LIBRARY = f"transformers {version('transformers')}"
LIMIT = 5e-3
"""How far logits may be off, as a share of the largest: those in the hundreds, which some of these random models have,
leave that much to rounding."""
PROBABILITY_LIMIT = 1e-3
"""How far a chunk's probability may be off: each of 22 chunks has .045 on average."""
SCALE_LIMIT = 1e-3
"""How far an attention's output may be from its weights' sum of the values, as a share."""


@dataclass(frozen=True)
class Outcome:
    """Of one architecture. Where it is traced and decoded, kind: of its attention; cached: what it keeps of a token.
    refused: why not, in the words of `lookahead`; unbuilt: why there is no tiny model of it here."""

    family: str
    name: str
    kind: str = ""
    cached: str = ""
    refused: str = ""
    unbuilt: str = ""


def outcome(family: str, seeds: tuple[int, ...] = SEEDS) -> Outcome:
    """Build, open, trace and decode; AssertionError where something is opened and its numbers are wrong."""
    name, kind, kept = class_of(family).__name__, "", ""
    for seed in seeds:
        try:
            model = tiny(family, seed)
        except Exception as error:  # of a config class whose fields the sizes do not fit, or of a package it wants
            return Outcome(family, name, unbuilt=one_line(error))
        try:
            backbone = adapter(model)
        except InputError as error:
            return Outcome(family, name, refused=str(error))
        check_trace(model, backbone, seed)
        check_decode(model, backbone, seed)
        kind, kept = describe(model), cached(model, backbone)
    return Outcome(family, name, kind, kept)


def describe(model: PreTrainedModel) -> str:
    """What its attention is like, and in how many layers."""
    count, total = len(attention_modules(model)), model.config.get_text_config(decoder=True).num_hidden_layers
    layers = "all layers" if count == total else f"{count} of {total} layers"
    kind = "DSA" if indexers(model) else "MLA" if caches_latents(model) else "ordinary"
    return f"{kind} in {layers}"


@torch.no_grad()
def cached(model: PreTrainedModel, backbone: Backbone) -> str:
    """What the stock model's cache holds of a token in the first layer that is traced, by its shapes."""
    cache, layer = DynamicCache(config=model.config), backbone.info.full_layers[0]
    model(ids(0, CHUNK), past_key_values=cache)
    held: Any = cache.layers[layer]
    module: Any = attention_modules(model)[layer]
    widths = [(side.shape[1], side.shape[3]) for side in (held.keys, held.values)]
    latent = getattr(module, "kv_lora_rank", None), getattr(module, "qk_rope_head_dim", None)
    parts = ["latent", "rope key"] if widths == [(1, latent[0]), (1, latent[1])] else ["keys", "values"]
    return ", ".join([*parts, "index key"] if getattr(held, "indexer_keys", None) is not None else parts)


def ids(seed: int, length: int) -> torch.Tensor:
    """[1, length], tokens of the tiny vocabulary that mean nothing special."""
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def check_trace(model: PreTrainedModel, backbone: Backbone, seed: int) -> None:
    """Raise AssertionError unless traced probabilities are eager attention weights, pooled by plain sums."""
    tokens, rows = ids(seed, PROMPT), torch.tensor([7, PROMPT // 2, PROMPT - 1])
    config = TraceConfig(
        chunking=Chunking(tokens=CHUNK, sink=1, recent=2), layers=backbone.info.full_layers[-1:], window=8, tail=4,
        text_rows=16, top_chunks=1000,
    )  # fmt: skip
    raw = backbone.trace(tokens[0].tolist(), rows, config)
    oracle, weights = raw.oracle, eager_weights(model, tokens)
    assert isinstance(oracle, SparseAttention)
    for index, row in enumerate(rows.tolist()):
        complete = (row + 1) // CHUNK
        layers = [weights[layer][:, row, : complete * CHUNK] for layer in backbone.info.full_layers]
        pooled = torch.stack(layers).unflatten(-1, (complete, CHUNK)).sum(-1)  # [layers, H, chunks]
        stored = slice(*oracle.pointers[index : index + 2].tolist())
        for part, theirs in ((oracle.mean, pooled.mean((0, 1))), (oracle.peak, pooled.amax(1).mean(0))):
            ours = torch.zeros(complete)
            ours[oracle.chunks[stored].long()] = part[stored].float().mean(1)
            error = float((ours - theirs).abs().max())
            assert error < PROBABILITY_LIMIT, f"traced probabilities differ by {error:.1e} from the eager weights"


def eager_weights(model: PreTrainedModel, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Layer -> attention weights [H, S, S] of the stock model's eager attention, as they show in its output: sinks that
    scale the output alone, of Granite with windows, scale them too."""
    calls: dict[int, AttentionCall] = {}
    seen: dict[int, torch.Tensor] = {}
    before: Any = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("eager")
    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.set_attn_implementation, before)
        stack.enter_context(observe(model, lambda call: calls.update({call.layer: call})))
        for layer, module in attention_modules(model).items():
            hook = module.register_forward_hook(
                lambda _, __, output, *, layer=layer: seen.update({layer: output[1][0]})
            )
            stack.callback(hook.remove)
        model(tokens, use_cache=False)
    scales = {layer: _scale(weights, calls[layer]) for layer, weights in seen.items()}
    for layer, scale in scales.items():
        if calls[layer].sinks is None:
            error = float((scale - 1).abs().max())
            assert error < SCALE_LIMIT, f"layer {layer}: its output is off its eager weights' sum by {error:.1e}"
    return {layer: weights * scales[layer][..., None] for layer, weights in seen.items()}


def _scale(weights: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """[H, S], what the weighted sum of the values is multiplied with to be the attention's output."""
    summed = weights @ call.value[0].repeat_interleave(len(weights) // call.value.shape[1], dim=0)
    return (summed * call.output[0].transpose(0, 1)).sum(-1) / summed.square().sum(-1)


@torch.no_grad()
def check_decode(model: PreTrainedModel, backbone: Backbone, seed: int) -> None:
    """Raise AssertionError unless a host reads as the stock model does, whole and masked."""
    length = PROMPT + sum(PIECES)
    tokens, chunks = ids(seed + 100, length), PROMPT // CHUNK
    generator = torch.Generator().manual_seed(seed)
    for share in (1.0, *SHARES):
        count = max(1, round(share * chunks))
        kept = torch.randperm(chunks, generator=generator)[:count].sort().values
        host = (DsaHost if indexers(model) else DenseHost)(model, CHUNK, backbone.info.full_layers[:1])
        stock = DynamicCache(config=model.config)
        host.read(tokens[:, :PROMPT])
        model(tokens[:, :PROMPT], past_key_values=stock)
        host.keep([torch.arange(chunks)[-1:]])  # all that is kept has to come back
        host.keep([kept])
        place = PROMPT
        for new in PIECES:
            piece = tokens[:, place : place + new]
            ours = host.read(piece)
            visible = sees(kept, chunks, place, place + new)
            with masked(model, visible) if share < 1 else ExitStack():
                theirs = model(piece, past_key_values=stock, logits_to_keep=1).logits[:, -1]
            place += new
            if share == 1:
                assert torch.equal(ours, theirs), "with everything resident logits are not the stock model's"
            error = float((ours - theirs).abs().max() / theirs.abs().max())
            assert error < LIMIT, f"with {share:.0%} resident logits differ by {error:.1e} from the masked model's"


def sees(kept: torch.Tensor, chunks: int, first: int, last: int) -> torch.Tensor:
    """[S, last]: what tokens first .. last - 1 see where `kept` of the first `chunks` chunks are resident."""
    visible = torch.ones(last, last, dtype=torch.bool).tril()[first:]
    resident = torch.zeros(chunks, dtype=torch.bool)
    resident[kept] = True
    visible[:, : chunks * CHUNK] &= resident.repeat_interleave(CHUNK)
    return visible


@contextmanager
def masked(model: PreTrainedModel, visible: torch.Tensor) -> Iterator[None]:
    """The stock model, whose full-attention layers see `visible` [S, T] only."""
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    with ExitStack() as stack:
        for module in attention_modules(model).values():
            hook = module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": bias}), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield


def table(rows: list[Outcome]) -> str:
    """docs/models.md."""
    working = [row for row in rows if row.kind]
    refused = [row for row in rows if row.refused]
    unbuilt = [row for row in rows if row.unbuilt]
    beside = ", ".join(sorted(set(classes()) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    lines = [
        "# Models",
        "",
        f"Every architecture of {LIBRARY} that has a causal LM class, other than deepseek_v4, as a tiny random model:",
        "all that `AutoModelForCausalLM` opens, and those exported as `...ForCausalLM` beside them, which it does not",
        f"open ({beside}). Kosmos2TextForCausalLM and Kosmos2_5TextForCausalLM are not exported: they are",
        "parts of larger models, and are left out. glm5_next, kimi_k25 and mistral_large4, which have MLA, are models",
        "of images and text without a causal LM class.",
        "`python -m benchmarks.models --write docs/models.md` makes this page, and says what is compared with what.",
        f"{len(working)} of {len(rows)} are traced and decoded; CI runs those again. {len(refused)} are refused when",
        "they are opened, in the words below, which come from the model's configuration, from its modules or from",
        f"reading a few tokens, not from a list of names. {len(unbuilt)} could not be tried. DeepSeek-V4 has an",
        "adapter and a host of its own, and tests of both.",
        "",
        "Where not all layers have full attention, those that have are traced and evicted. The others hold a window or",
        "a state, and are left as they are. A layer is what the cache holds as one: longcat_flash has two attention",
        "blocks in a decoder layer, which are layers 0 and 1, then 2 and 3.",
        "",
        "A chunk's key is the mean of what a layer caches first of its tokens, before positions: the keys of all key",
        "heads, or with multi-head latent attention (MLA) the latent, of which each head makes its keys by a linear",
        "map: on the pocket model as good a key as the content keys of all heads, which are wider",
        "([results.md](results.md)).",
        "With sparse attention by a lightning indexer (DSA) it is the mean of the index keys, at a width of 128 in 256",
        "bytes of fp16: the 132-byte form is exact for the key of one token that an engine stores so, and would round",
        "the mean of 64.",
        "",
        "Kept and fetched is all that the model caches of a token. The last column says what that is, by the shapes in",
        "its own cache: with MLA the latent and the part of the key that turns with the position (rope key), where the",
        "implementation caches those, or else the keys and values of all heads that it makes of them.",
        "",
        "| architecture | class | attention | cached, kept and fetched of a token |",
        "|---|---|---|---|",
        *(f"| {row.family} | {row.name} | {row.kind} | {row.cached} |" for row in working),
        "",
        "## Refused",
        "",
        "Gemma-3n is tried as it is published: its last layers take the keys of earlier ones. A model of a family",
        "above is refused where its own configuration gives such a reason: the small Gemma-4 models, which share keys",
        "in the same way.",
        "",
        "| architecture | because |",
        "|---|---|",
        *(f"| {row.family} | {row.refused.removeprefix(row.name).lstrip(': ')} |" for row in refused),
        "",
        "## Not tried",
        "",
        "gemma3n wants a package that is not installed here. Of the config classes of Gemma-4's assistants no tiny",
        "model could be made: they have no keys of their own and attend to those of the model that they draft for.",
        "",
        "| architecture | because |",
        "|---|---|",
        *(f"| {row.family} | {row.unbuilt} |" for row in unbuilt),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print every outcome, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all of them unless named")
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for family in options.families or families():
        try:
            rows.append(outcome(family))
        except AssertionError as error:
            raise SystemExit(f"{family}: {error}") from error
        said = rows[-1].refused or rows[-1].unbuilt or f"traced and decoded: {rows[-1].kind}; {rows[-1].cached}"
        print(f"{family}: {said}", flush=True)
    if options.write:
        options.write.write_text(table(rows))


if __name__ == "__main__":
    main()
