"""What each trick of data_gen/core/cpu.py gains on this processor: all tricks on, and all but one, in turns.

    python -m benchmarks.cpu_tricks [--only SteadyLinear ...] [--rounds 3] [--steps 16] [--output FILE.json]

Step: CPU-seconds of training steps as `lookahead train` takes them, on the documents of benchmarks/train.py (4,096
chunks, 3 layers, hidden 4096, 128 heads of rank 2048, sampled candidates, one thread), batches made in the same
thread. Memory (of `return_freed_memory`): the most that evaluating long documents held. A ratio above 1 is a gain; 5 %
either way is noise. Each side runs in a process of its own: the allocator and torch read their settings once.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.documents import LAYERS, WINDOW, write_store
from benchmarks.evaluate import measure_whole, write_documents
from benchmarks.machine import machine, origin
from benchmarks.train import BATCH, HUGE_PAGES, measure_ours, peak_memory
from data_gen import generate
from data_gen.config import TraceConfig
from data_gen.core import cpu
from data_gen.core.chunks import Chunking
from data_gen.core.shard import Shard
from data_gen.flashmemory.folder import import_dumps
from recipes import load_recipe

HEADS, RANK = 128, 2048
LONG_CHUNKS, LONG_TOKENS, LONG_DOCUMENTS = 98_304, 64, 3


def without_steady_linear() -> None:
    """Stock layers, which allocate every gradient anew."""
    from indexer_train import scorer

    scorer.SteadyLinear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)


def without_onednn() -> None:
    """PyTorch's default library for every product."""
    cpu.ONEDNN = False


def without_kept_memory() -> None:
    """glibc gives large blocks back as soon as they are free."""
    from indexer_train.training import trainer

    trainer.keep_freed_memory = generate.keep_freed_memory = lambda: None


def without_returned_memory() -> None:
    """glibc moves its bound up with the blocks that it sees freed, and keeps them."""
    from eval.offline import evaluation

    evaluation.return_freed_memory = lambda: None


TRICKS = {
    "keep_freed_memory": without_kept_memory,
    "ask_for_huge_pages": lambda: None,  # the environment of the process says it
    "ONEDNN": without_onednn,
    "SteadyLinear": without_steady_linear,
    "return_freed_memory": without_returned_memory,
}
"""By its name in data_gen/core/cpu.py: how to do without it."""
UNITS = {"step": "CPU-seconds a step", "document": "CPU-seconds a document", "memory": "GiB"}
MATTERS = {
    "step": ["keep_freed_memory", "ask_for_huge_pages", "ONEDNN", "SteadyLinear"],
    "document": ["keep_freed_memory", "ONEDNN"],
    "memory": ["return_freed_memory"],
}
"""The tricks that each measurement can tell something about."""


def prepare(what: str, folder: Path) -> Path:
    """The documents of a measurement, in `folder`; tracing draws its own."""
    if what == "step":
        return write_store(folder, 8, 4096)
    return write_long(folder) if what == "memory" else folder


def write_long(folder: Path) -> Path:
    """Documents whose scores are blocks of many MiB, in `folder`, and the same as a trace store."""
    folder.mkdir()
    write_documents(folder, LONG_DOCUMENTS, LONG_CHUNKS, LONG_TOKENS)
    chunking = Chunking(tokens=4, sink=0, recent=0)
    trace = TraceConfig(chunking=chunking, layers=LAYERS, oracle="indexer", window=WINDOW, tail=1)
    import_dumps(folder, folder / "store", trace, lambda items, _: items)
    return folder


def trace_documents(folder: Path, count: int = 4) -> float:
    """CPU-seconds a document, drawing it included, loading the model not."""
    recipe = load_recipe("smollm2-quickstart")
    documents = recipe.documents.model_copy(update={"train": {"text": count}, "heldout": {"text": 1}})
    backbone, tokenizer = generate.open_backbone(recipe.backbone, Shard())
    began = time.process_time()
    generate.generate(backbone, tokenizer, documents, recipe.trace, folder)
    return (time.process_time() - began) / (count + 1)


def measure(what: str, off: str, folder: Path, steps: int) -> float:
    """What `UNITS` says, without the trick `off` ("" for none)."""
    torch.set_num_threads(1)
    if off:
        TRICKS[off]()
    if what == "memory":
        measure_whole(folder, 8, 64)
        return peak_memory()
    if what == "document":
        with tempfile.TemporaryDirectory() as traces:
            return trace_documents(Path(traces))
    return BATCH / measure_ours(folder, HEADS, RANK, steps)["speed"]


def run(what: str, off: str, folder: Path, steps: int) -> float:
    """`measure` in a process of its own."""
    asked = ["--measure", what, "--off", off, "--folder", str(folder), "--steps", str(steps)]
    pages = "0" if off == "ask_for_huge_pages" else "1"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **dict.fromkeys(HUGE_PAGES, pages)}
    command = [sys.executable, "-m", "benchmarks.cpu_tricks", *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        sys.exit(f"{what} without {off or 'nothing'} failed:\n{done.stderr[-2000:]}")
    return float(re.findall(r"^measured (.*)$", done.stdout, re.M)[-1])


def compare(what: str, tricks: list[str], folder: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Medians with all tricks and without each, in turns, and what each gains."""
    sides: dict[str, list[float]] = {off: [] for off in ("", *tricks)}
    for _ in range(rounds):
        for off, found in sides.items():
            found.append(run(what, off, folder, steps))
    unit, on, results = UNITS[what], statistics.median(sides[""]), []
    for trick in tricks:
        off = statistics.median(sides[trick])
        print(f"{trick}: {off / on:.2f}x ({on:.3f} {unit} with it, {off:.3f} without)", flush=True)
        results.append({"trick": trick, "ratio": off / on, "unit": unit, "on": sides[""], "off": sides[trick]})
    return results


def main() -> None:
    """Write the documents, then compare trick by trick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TRICKS), default=list(TRICKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--output", type=Path, help="Write all figures there, with commit and hardware.")
    parser.add_argument("--measure", choices=list(UNITS), help=argparse.SUPPRESS)
    parser.add_argument("--off", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(f"\nmeasured {measure(arguments.measure, arguments.off, arguments.folder, arguments.steps)}")
        return
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        results = []
        for what, tricks in MATTERS.items():
            if asked := [trick for trick in tricks if trick in arguments.only]:
                results += compare(what, asked, prepare(what, Path(name) / what), arguments.rounds, arguments.steps)
    if arguments.output:
        content = origin() | {"results": results}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
