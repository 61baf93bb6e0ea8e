"""How fast vLLM decodes long contexts, stock and with an indexer: python -m benchmarks.decode_vllm --out decode.json

Runs in an environment for serving (docs/serving.md), with one GPU. The model has the shape of Llama-3.1-8B, as many
layers as asked for, and random weights, and the indexer too: what is measured is time, not what is said. Engines are
started one after the other: stock vLLM with its own choices, stock vLLM with the model runner that the plugin needs,
and the plugin. Prompts are random tokens, read beforehand into the prefix cache; a cell is the rate while all requests
of a batch are decoded, at equal lengths of context. `read` is the share of the blocks that the plugin read, by its own
counters. With --profile each cell is decoded once more under PyTorch's profiler, after all are timed. What is printed
is a step's time without the profiler, that of the device's operations in it (on a machine without one, of the CPU's
outermost), what is left for everything else, and which operations differ most from the first engine's in time.
"""

# pyright: reportMissingImports=false

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import origin
from benchmarks.serving_vllm import figures
from data_gen.core.chunks import Chunking
from data_gen.core.fingerprint import SINGLE, checkpoint_tensors, fingerprint
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.scorer import Scorer
from indexer_train.selection import Budget
from indexer_train.spec import IndexerSpec

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
TOY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Kinds of events that a device works at, as the profiler names them."""
CHUNK, WINDOW, KEPT = 16, 64, 0.1
SERVERS = {
    "stock": {},
    "stock-v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "lookahead": {"VLLM_USE_V2_MODEL_RUNNER": "0", "LOOKAHEAD_BUNDLE": "{folder}/bundle"},
}
"""Environment of each engine, over this process's own."""


@dataclass(frozen=True)
class Cell:
    """One engine's rate at one size."""

    server: str
    context: int
    batch: int
    tokens_per_second: float
    step_ms: float
    read: float | None

    def row(self) -> str:
        """A line under HEADER."""
        read = "-" if self.read is None else f"{self.read:.1%}"
        return (
            f"{self.server:<11}{self.context:>9,}{self.batch:>7}{self.tokens_per_second:>11.1f}"
            f"{self.step_ms:>10.2f}{read:>9}"
        )


HEADER = "server       context  batch   tokens/s   ms/step     read"


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A checkpoint without weights, which the engine draws itself, and its bundle; the fingerprint is a norm's."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    save_file({"model.norm.weight": torch.ones(shape["hidden_size"], dtype=torch.bfloat16)}, folder / SINGLE)
    layers = shape["num_hidden_layers"]
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=128, distance_bumps=12),
        layers=sorted({layers // 4, layers // 2, layers * 3 // 4}), hidden=shape["hidden_size"],
        key_width=shape["num_key_value_heads"] * shape["head_dim"], chunking=Chunking(tokens=CHUNK),
        window=WINDOW, backbone=fingerprint(checkpoint_tensors(folder)), selections=[Budget(budget=KEPT)],
    )  # fmt: skip
    torch.manual_seed(0)
    export_bundle(SimpleNamespace(spec=spec, query_encoder=Scorer(spec)), folder / "bundle")  # pyright: ignore[reportArgumentType]


def cells(contexts: list[int], batches: list[int], most: int) -> list[tuple[int, int]]:
    """(context, batch) of at most so many tokens, the longest contexts first, because the shorter ones begin them."""
    sizes = [(context, batch) for context in sorted(contexts, reverse=True) for batch in sorted(batches, reverse=True)]
    return [(context, batch) for context, batch in sizes if context * batch <= most]


def prompt(sequence: int, tokens: int, vocabulary: int) -> dict[str, list[int]]:
    """Random tokens; of two prompts of one sequence the shorter one begins the longer one."""
    random = torch.Generator().manual_seed(sequence)
    return {"prompt_token_ids": torch.randint(10, vocabulary, (1 << 17,), generator=random)[:tokens].tolist()}


def measure(server: str, folder: Path, args: argparse.Namespace) -> None:
    """All cells of one engine, printed and written as they come. In a process of its own, because settings come by
    environment."""
    os.environ.update({name: value.format(folder=folder) for name, value in SERVERS[server].items()})
    from vllm import LLM, __version__

    gpu, shape = torch.cuda.is_available(), json.loads((folder / "config.json").read_text())
    options: dict[str, Any] = {
        "load_format": "dummy", "skip_tokenizer_init": True, "disable_log_stats": False, "dtype": "bfloat16",
        "block_size": CHUNK if gpu or server == "lookahead" else 2 * CHUNK, "max_num_seqs": max(args.batches),
        "compilation_config": {"cudagraph_capture_sizes": sorted(args.batches)},
    }  # fmt: skip
    if gpu and server == "lookahead":
        options["attention_backend"] = "CUSTOM"
    if args.profile:
        options["profiler_config"] = {
            "profiler": "torch", "torch_profiler_dir": str(folder / "profile"), "torch_profiler_with_stack": False,
            "torch_profiler_use_gzip": False,
        }  # fmt: skip
    given = json.loads(args.engine)
    options["compilation_config"] |= given.pop("compilation_config", {})
    llm = LLM(str(folder), **options | given)
    for cell in timed(llm, server, shape["vocab_size"], args):
        print(cell.row(), flush=True)
        keep(args.out, asdict(cell), vllm=__version__)
    if args.profile:
        for context, batch in cells(args.contexts, args.batches, args.most):
            prompts = [prompt(sequence, context - args.new, shape["vocab_size"]) for sequence in range(batch)]
            named = {"server": server, "context": context, "batch": batch}
            keep(args.out, named | {"profile": profiled(llm, prompts, folder / "profile")})
    llm.llm_engine.engine_core.shutdown()  # this process waits for the engine's when it ends


def keep(out: Path, row: dict[str, Any], **about: str) -> None:
    """Add a row to what OUT holds, or what is new to the row of that engine and size."""
    known = json.loads(out.read_text()) | about
    same = [each for each in known["rows"] if all(each[name] == row[name] for name in ("server", "context", "batch"))]
    if same:
        same[0] |= row
    else:
        known["rows"].append(row)
    out.write_text(json.dumps(known, indent=1) + "\n")


def timed(llm: Any, server: str, vocabulary: int, args: argparse.Namespace) -> Iterator[Cell]:
    """Each cell twice, the second time on the prefix cache; the first one may end early."""
    for context, batch in cells(args.contexts, args.batches, args.most):
        prompts = [prompt(sequence, context - args.new, vocabulary) for sequence in range(batch)]
        decode(llm, prompts, 4)
        before = counters()
        rate = steady(decode(llm, prompts, args.new))
        after = counters()
        counted = {name: value - before.get(name, 0) for name, value in after.items()}
        made = counted.get("lookahead:made_total")
        read = counted["lookahead:read_total"] / made if made else None
        yield Cell(server, context, batch, rate, 1000 * batch / rate, read)


Operations = dict[str, tuple[float, float]]
"""Name -> (number, milliseconds) a step."""


def profiled(llm: Any, prompts: list[dict[str, list[int]]], traces: Path) -> Operations:
    """Operations of a step, over two windows."""
    llm.start_profile()
    decode(llm, prompts, 2 * WINDOW)
    llm.stop_profile()
    (trace,) = (file for file in traces.rglob("*.json") if '"traceEvents"' in file.read_text())
    events = json.loads(trace.read_text())["traceEvents"]
    trace.unlink()  # the next cell's is found by being the only one
    return operations(events, 2 * WINDOW)


def operations(events: list[dict[str, Any]], steps: int) -> Operations:
    """What the device did, of a trace's events (times in microseconds); without a device, the CPU's outermost ones."""
    timed = [event for event in events if event.get("ph") == "X"]
    found = [event for event in timed if event.get("cat") in DEVICE]
    if not found:
        until: dict[Any, float] = {}
        for event in sorted((event for event in timed if event.get("cat") == "cpu_op"), key=lambda each: each["ts"]):
            if event["ts"] >= until.get(event["tid"], 0):
                until[event["tid"]] = event["ts"] + event["dur"]
                found.append(event)
    sums: Operations = {}
    for event in found:
        number, spent = sums.get(event["name"], (0.0, 0.0))
        sums[event["name"]] = number + 1 / steps, spent + event["dur"] / 1000 / steps
    return sums


def differences(rows: list[dict[str, Any]], most: int = 12) -> str:
    """A step's time and that of its operations, and those that differ most in time from the first engine's."""
    lines = []
    for row in rows:
        first = next(each for each in rows if (each["context"], each["batch"]) == (row["context"], row["batch"]))
        own, other = row["profile"], first["profile"]
        number, spent = sum(each[0] for each in own.values()), sum(each[1] for each in own.values())
        lines.append(
            f"{row['server']}, {row['context']:,} x {row['batch']}: {row['step_ms']:.3f} ms a step, "
            f"{number:.1f} operations of {spent:.3f} ms, {row['step_ms'] - spent:+.3f} ms of everything else"
        )
        more = [
            (*(a - b for a, b in zip(own.get(name, (0, 0)), other.get(name, (0, 0)), strict=True)), name)
            for name in (own.keys() | other.keys() if row is not first else ())
        ]
        for number, spent, name in sorted(more, key=lambda each: -abs(each[1]))[:most]:
            lines.append(f"  {number:+8.2f} {spent:+8.4f} ms  {name[:100]}")
    return "\n".join(lines)


def decode(llm: Any, prompts: list[dict[str, list[int]]], tokens: int) -> list[list[float]]:
    """Answer all prompts at once; returns when each token of each answer came, in seconds."""
    from vllm import SamplingParams

    engine, came = llm.llm_engine, [[] for _ in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for number, each in enumerate(prompts):
        engine.add_request(str(number), each, sampling)
    while engine.has_unfinished_requests():
        for answer in engine.step():
            times = came[int(answer.request_id)]
            times += [time.perf_counter()] * (len(answer.outputs[0].token_ids) - len(times))
    return came


def steady(came: list[list[float]]) -> float:
    """Tokens a second of all requests, from when each has its first token to when one has its last."""
    begin, end = max(times[0] for times in came), min(times[-1] for times in came)
    if end <= begin:
        raise SystemExit("no moment at which all requests were decoded; raise --new")
    return sum(begin < moment <= end for times in came for moment in times) / (end - begin)


def counters() -> dict[str, float]:
    """The engine's own figures so far, by name; the plugin's are among them."""
    from prometheus_client import generate_latest

    return figures(generate_latest().decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[4096, 32768, 131072], help="tokens, answer included"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--most", type=int, default=1 << 20, help="tokens of the largest cell; larger ones are left out"
    )
    parser.add_argument("--new", type=int, default=513, help="tokens of an answer")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--profile", action="store_true", help="say also which operations a step has")
    parser.add_argument("--engine", default="{}", help="more options of every engine, in JSON")
    parser.add_argument("--toy", action="store_true", help="a narrow model, for a machine without a GPU")
    args = parser.parse_args()
    machine = origin("cuda" if torch.cuda.is_available() else "cpu")
    args.out.write_text(json.dumps({"origin": machine, "layers": args.layers, "rows": []}) + "\n")
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_model(folder, LLAMA | (TOY if args.toy else {}) | {"num_hidden_layers": args.layers})
        print(HEADER, flush=True)
        for server in args.servers:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(measure, server, folder, args).result()
    if args.profile:
        print(differences(json.loads(args.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
