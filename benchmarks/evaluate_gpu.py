"""Evaluation on a GPU beside the same host's CPU: seconds, and how far apart the figures are.

    python -m benchmarks.evaluate_gpu [--documents 13 --tokens 32768 --rows 2048] [--output evaluate-gpu.json]

Random traces of a dense model with every baseline: documents of 32K tokens in chunks of 16, of which the last `rows`
are query tokens, three layers of 640 values, keys of 256, the 256 best chunks of each token kept by the oracle. All
sections of `lookahead evaluate` are made twice on the GPU (the first time kernels are loaded) and once on the CPU. A
machine without a GPU makes the CPU's column alone.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from benchmarks.machine import origin
from benchmarks.timing import check_output
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, Manifest, RawTrace, Span, SparseAttention
from eval.offline.evaluation import evaluate
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer

LAYERS, HIDDEN, KEY, STORED, CHUNK = [0, 1, 2], 640, 256, 256, 16
GOLDEN, BUDGET = 0.05, 0.1


def write_traces(root: Path, documents: int, tokens: int, rows: int) -> TraceStore:
    """A held-out store of random documents whose query tokens need a few chunks much and most of them little."""
    chunks = tokens // CHUNK
    trace = TraceConfig(
        chunking=Chunking(tokens=CHUNK, sink=1, recent=16), layers=LAYERS, window=64, text_rows=rows, tail=16
    )
    backbone = BackboneInfo("random", "random", LAYERS, HIDDEN, KEY, tokens)
    plan = {number: (str(number), "") for number in range(documents)}
    manifest = Manifest(backbone=backbone, trace=trace, documents={"split": "heldout"}, plan=plan, versions={})
    store = TraceStore.create(root, manifest)
    positions = torch.arange(tokens - rows, tokens)
    for index in range(documents):
        rng = torch.Generator().manual_seed(index)
        mean = torch.rand(rows, chunks, 1, generator=rng).pow(30)
        mean /= mean.sum(dim=1, keepdim=True)
        seen = (positions + 1) // CHUNK
        raw = RawTrace(
            hidden={layer: torch.randn(rows, HIDDEN, generator=rng).bfloat16() for layer in LAYERS},
            keys={layer: torch.randn(chunks, KEY, generator=rng).half() for layer in LAYERS},
            positions=positions,
            oracle=SparseAttention.from_dense(mean, (8 * mean).clamp_max(1), seen, min(STORED, chunks)),
            mean_pooled=torch.rand(rows, chunks, generator=rng).half(),
        )
        span = Span(first=0, last=rows, serve=0, tail=False)
        store.write(index, DocumentMeta(name=str(index), task="text", length=tokens, spans=[span]), raw)
    return store


def make_indexer(store: TraceStore, device: str) -> MemoryIndexer:
    """The same random weights on any device."""
    torch.manual_seed(0)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=128),
        layers=LAYERS,
        hidden=HIDDEN,
        key_width=KEY,
        chunking=store.manifest.trace.chunking,
        window=store.manifest.trace.window,
        backbone=store.manifest.backbone.fingerprint,
    )
    return MemoryIndexer.from_spec(spec, device="cpu").to(device).eval()


def figures(value: Any, path: str = "") -> dict[str, float]:
    """Every number of the sections, by where it stands."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict | list | tuple):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for name, each in entries for key, number in figures(each, f"{path}/{name}").items()}
    return {path: float(value)} if isinstance(value, int | float) else {}


def timed(store: TraceStore, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """(seconds by the clock and of the CPU, every figure) of one evaluation."""
    indexer = make_indexer(store, device)
    clock, used = time.perf_counter(), time.process_time()
    found = figures(evaluate({"indexer": indexer}, store, GOLDEN, BUDGET))
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - used}, found


def measure(store: TraceStore, gpu: bool) -> dict[str, Any]:
    """Both devices' seconds, and the largest difference between their figures."""
    report: dict[str, Any] = {}
    if gpu:
        report["gpu_first"], _ = timed(store, "cuda")
        report["gpu"], there = timed(store, "cuda")
    report["cpu"], here = timed(store, "cpu")
    report["figures"] = len(here)
    if gpu:
        apart = {name: abs(value - there[name]) for name, value in here.items() if value == value}
        worst = max(apart, key=apart.__getitem__)
        report |= {"largest_difference": apart[worst], "where": worst}
        report["cpu_seconds_over_gpu_seconds"] = report["cpu"]["cpu_seconds"] / report["gpu"]["seconds"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=13)
    parser.add_argument("--tokens", type=int, default=1 << 15)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    if arguments.output:
        check_output(arguments.output)
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        store = write_traces(Path(name) / "store", arguments.documents, arguments.tokens, arguments.rows)
        report = measure(store, gpu)
    for figure, value in report.items():
        print(f"{figure}: {value}")
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        where = origin("cuda" if gpu else "cpu")
        arguments.output.write_text(json.dumps({"origin": where, **settings, **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
