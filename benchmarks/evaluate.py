"""Speed of evaluation over all chunks, beside the FlashMemory release's on the same documents with the same weights.

    python -m benchmarks.evaluate [--release CHECKOUT] [--heads 128 --rank 2048] [--documents 8] [--output FILE]
    python -m benchmarks.evaluate --chunks 262144 --documents 1 --tokens 64   # the memory of one long document

Data: as in benchmarks/train.py (512 query tokens, 4,096 chunks, 3 layers, hidden 4096), every chunk visible to every
token, as the release takes it to be. Every token is scored against every chunk; micro precision, recall and F1 at the
threshold and recall@128 .. 1024 of every layer and of their maximum. Prints tokens per CPU-second of the whole
evaluation, files included (one thread), peak resident memory, and how far the metrics are apart. Without --release it
says so and measures ours alone, and then all that `lookahead evaluate --every-token` does: baselines, budgets,
lookahead, reliability and timeline.
"""

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import GOLDEN, HIDDEN, LAYERS, TOKENS, WINDOW, write_dumps
from benchmarks.machine import origin
from benchmarks.train import HUGE_PAGES, peak_memory
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking

Metrics = dict[str, dict[str, float | None]]
"""Of each layer ("layer 10") and of their maximum ("joined"): precision, recall, f1, recall@128 ... or None."""


def write_documents(folder: Path, documents: int, chunks: int, tokens: int) -> None:
    """The training benchmark's dumps, cut to `tokens` query tokens that come after all the chunks (where rope ends,
    at 2^20 positions, after all but the last few)."""
    write_dumps(folder, documents, chunks)
    start = min(4 * chunks, 2**20 - tokens)
    for path in folder.glob("doc_*.pkl"):
        tensors = pickle.loads(path.read_bytes())
        end = int(tensors["label_pointers"][tokens])
        for layer in LAYERS:
            tensors[f"hidden_layer_{layer}"] = tensors[f"hidden_layer_{layer}"][:tokens].clone()
            tensors[f"positions_layer_{layer}"] = torch.arange(start, start + tokens)
        tensors["label_pointers"] = tensors["label_pointers"][: tokens + 1].clone()
        for name in ("label_indices", "label_scores"):
            tensors[name] = tensors[name][:end].clone()
        path.write_bytes(pickle.dumps(tensors, protocol=4))


def make_indexer(folder: Path, heads: int, rank: int) -> Any:
    """The same random weights for both sides."""
    from data_gen.traces.store import TraceStore
    from indexer_train.config import IndexerConfig
    from indexer_train.load import spec_for
    from indexer_train.model import MemoryIndexer

    store = TraceStore.open(folder / "store")
    torch.manual_seed(0)
    shape = IndexerConfig(heads=heads, rank=rank, distance_bumps=0, scale=False, slot=False, join="max")
    return MemoryIndexer.from_spec(spec_for(store.manifest, shape), device="cpu"), store


def measure_ours(folder: Path, heads: int, rank: int) -> tuple[float, Metrics]:
    """(CPU-seconds, metrics) of what `lookahead evaluate --every-token` does for the indexer."""
    from eval.offline.recall import Group, measure, recall_rows
    from eval.report.rows import RecallRow
    from indexer_train.selection import Cut, Threshold

    indexer, store = make_indexer(folder, heads, rank)
    start = time.process_time()
    found = measure(
        {"indexer": indexer},
        store,
        GOLDEN,
        {"indexer": [Threshold(cuts=[Cut(score=0.0)])]},
        every_token=True,
        budgets=(),
        baselines=False,
    )
    rows = recall_rows(list(found), RecallRow, lambda _: [Group("all")])
    seconds = time.process_time() - start
    metrics: Metrics = {}
    for row in rows:
        of = metrics.setdefault("joined" if row.policy == "indexer" else row.policy, {})
        if row.budget == "threshold":
            of |= {"precision": row.micro.precision, "recall": row.micro.golden_recall, "f1": row.micro.f1}
        else:
            of[f"recall@{row.top}"] = row.golden_recall
    return seconds, metrics


def measure_whole(folder: Path, heads: int, rank: int) -> tuple[float, Metrics]:
    """(CPU-seconds, nothing) of everything that `lookahead evaluate --every-token` measures."""
    from eval.offline.evaluation import evaluate

    indexer, store = make_indexer(folder, heads, rank)
    start = time.process_time()
    evaluate({"indexer": indexer}, store, GOLDEN, 0.1, every_token=True)
    return time.process_time() - start, {}


def measure_release(folder: Path, checkout: Path, heads: int, rank: int) -> tuple[float, Metrics]:
    """(CPU-seconds, metrics) of its evaluation of one model a layer, joined in three ways."""
    indexer, _ = make_indexer(folder, heads, rank)
    sys.path.insert(0, str(checkout / "training"))
    from train import LightningIndexerTrainable  # pyright: ignore[reportAttributeAccessIssue] - the checkout's, not ours

    from eval import evaluate_full_multi_ensemble  # pyright: ignore[reportAttributeAccessIssue] - as above

    models = {}
    for layer in LAYERS:
        theirs = LightningIndexerTrainable(layer, n_heads=heads, q_lora_rank=rank)
        ours = indexer.query_encoder.encoders[str(layer)]
        for name in ("wq_a", "wq_b", "weights_proj"):
            getattr(theirs, name).weight.data = getattr(ours, name).weight.data
        theirs.q_norm_weight.data = ours.q_norm.weight.data
        models[layer] = theirs
    start = time.process_time()
    specs = [{"data_dir": str(folder), "doc_ids": None}]
    found = evaluate_full_multi_ensemble(models, specs, label_interval=WINDOW, device="cpu")
    seconds = time.process_time() - start
    names = {"max": "joined"} | {f"L{layer}": f"layer {layer}" for layer in LAYERS}
    return seconds, {names[key]: value for key, value in found.items() if key in names}


def main() -> None:
    """Write the documents, then measure each side in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, help="A checkout of the FlashMemory release.")
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--rank", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--chunks", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Write the figures here as JSON.")
    parser.add_argument("--measure", choices=["ours", "whole", "release"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.heads, arguments.rank)
    if arguments.measure:
        torch.set_num_threads(1)
        if arguments.measure == "release":
            seconds, metrics = measure_release(arguments.folder, arguments.release, *shape)
        else:
            ours = measure_ours if arguments.measure == "ours" else measure_whole
            seconds, metrics = ours(arguments.folder, *shape)
        found = {"seconds": seconds, "memory": peak_memory(), "metrics": metrics}
        print(f"\nmeasured {json.dumps(found)}")
        return
    from data_gen.flashmemory.folder import import_dumps

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder, arguments.documents, arguments.chunks, arguments.tokens)
        chunking = Chunking(tokens=4, sink=0, recent=0)
        trace = TraceConfig(chunking=chunking, layers=LAYERS, oracle="indexer", window=WINDOW, tail=1)
        if failed := import_dumps(folder, folder / "store", trace, lambda items, _: items).failed:
            sys.exit("\n".join(failed))

        def run(side: str) -> dict[str, Any]:
            command = [sys.executable, "-m", "benchmarks.evaluate", *sys.argv[1:], "--measure", side, "--folder", name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if side == "release" else HUGE_PAGES)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
            return json.loads(re.findall(r"^measured (.*)$", done.stdout, re.M)[-1])

        sides = ["ours", "whole"] if arguments.release is None else ["ours", "release"]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):  # in turns: a shared machine is not equally fast all the time
            for side in sides:
                runs[side].append(run(side))
        tokens = arguments.documents * arguments.tokens
        speed = {side: tokens / statistics.median(each["seconds"] for each in found) for side, found in runs.items()}
        print(f"H {shape[0]}, R {shape[1]}, hidden {HIDDEN}, {arguments.documents} documents of {arguments.chunks} "
              f"chunks and {arguments.tokens} tokens, one thread, median of {arguments.rounds}")  # fmt: skip
        for side, found in runs.items():
            memory = max(each["memory"] for each in found)
            print(f"{side}: {speed[side]:.1f} tokens per CPU-second, peak memory {memory:.2f} GiB")
        if arguments.output:
            found = {**origin(), "tokens_per_cpu_second": speed, "runs": runs}
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
        if arguments.release is None:
            print("release: not measured, no checkout was given (--release)")
            return
        print(f"ours is {speed['ours'] / speed['release']:.2f}x")
        ours, theirs = (runs[side][0]["metrics"] for side in ("ours", "release"))
        for what, values in ours.items():
            apart = max(abs(value - values[metric]) for metric, value in theirs[what].items() if metric in values)
            shown = ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            print(f"{what}: {shown}; the release's at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
