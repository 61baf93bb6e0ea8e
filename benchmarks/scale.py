"""What grows with the number of documents: planning, opening a store, an epoch's reading, several workers.

Usage: python -m benchmarks.scale plan [--documents 100000] [--tokens 1000 2000]
       python -m benchmarks.scale open [--documents 20000]
       python -m benchmarks.scale epoch [--documents 64] [--folder MOUNT --server PID]
       python -m benchmarks.scale workers
       python -m benchmarks.scale estimate [--documents 10000] [--tokens 131072] [--store OUT]

Each part adds its figures to benchmarks/results/scale-cpu.json (or --output) and prints them; those of --store are kept
only where --output says so. All but the last run in processes of their own; memory is the most that such a process
held.

plan: documents as long as those that stand in for long ones on small models (1,000 to 2,000 tokens), packed as a recipe
packs text, from the sentences of the built-in one in ever new orders, with the tokenizer of SmolLM2.
open: traces of 320 query tokens, narrow ones, so that files are small; all that `lookahead train` does before its first
step, every sixth document held back as by default, with a loss of graded labels and with one of golden chunks, then the
check of every byte. The files were written just before, so that the kernel has them in memory.
epoch: bytes read over the bytes of the files, of all candidates and of sampled ones. Read is what the kernel fetched
from storage for this process (read_bytes of /proc/self/io) during an epoch of batches. A file's pages are dropped
before and once its batch is made, so that whatever is read twice counts twice; a run that read less than its batches
need is refused. --folder says where the files lie: on a network file system, that is what is measured. Where the kernel
does not count a process's reads (FUSE), --server names the process that serves the file system, on this machine, and
read is what it was asked for and has read (rchar of its /proc/PID/io, the requests themselves included).
workers: documents a second by 1, 2 and 4 processes, of which each has one thread, beside what the model alone reads in
one.
estimate: the bytes that so many documents leave, computed from the settings of two recipes, and the time that copying
them and reading them for an epoch takes over 10 Gbit/s, with the ratio that `epoch` measured. --store: the same of a
model of your own, and hours, from documents that one worker has traced with it into OUT: their bytes, and their
tokens a second.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.machine import origin
from benchmarks.scale_estimate import estimate
from benchmarks.train import peak_memory
from data_gen.config import BackboneConfig, DocumentsConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.shard import Shard
from data_gen.generate import open_backbone, plan_documents
from data_gen.text.plan import Plan
from data_gen.text.sources import read_source
from data_gen.traces.progress import PLAN
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, Manifest, RawTrace, Span, SparseAttention
from recipes import load_recipe

OUTPUT = Path(__file__).parent / "results" / "scale-cpu.json"
TINY = BackboneConfig(path="tiny")
TRACE = TraceConfig(chunking=Chunking(tokens=4, sink=1, recent=4), layers=[0, 1, 2], window=16, text_rows=128, tail=4)


def write_source(path: Path, tokens: int) -> None:
    """Rows of text of about `tokens` tokens in all, every paragraph another one: sentences of the built-in text."""
    texts = [text for text in read_source("builtin", "text") if isinstance(text, str)]  # all of it: no chats
    sentences = [line for text in texts for line in text.split("\n") if len(line) > 60]
    rng, written = random.Random(0), 0
    with open(path, "w") as file:
        while written < 4.2 * tokens:  # characters of a token of this text
            number = written
            paragraphs = [f"{number}.{each} " + " ".join(rng.sample(sentences, 4)) for each in range(16)]
            row = json.dumps({"text": "\n\n".join(paragraphs)})
            written += len(row)
            file.write(row + "\n")


def plan(folder: Path, documents: int, tokens: list[int], model: str) -> dict[str, Any]:
    """Plan `documents` documents of between these numbers of tokens."""
    source = folder / "source.jsonl"
    write_source(source, int(1.2 * documents * sum(tokens) / 2))
    before, began = peak_memory(), time.perf_counter()
    heldout = max(1, documents // 100)
    config = DocumentsConfig(
        source=str(source),
        tokens=(tokens[0], tokens[1]),
        train={"text": documents - heldout},
        heldout={"text": heldout},
        heldout_share=0.05,
    )
    made = plan_documents(BackboneConfig(path=model), config, TRACE, folder)
    seconds = time.perf_counter() - began
    lengths = [row["length"] for rows in made.brief.values() for row in rows]
    return {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "source_mib": source.stat().st_size / 2**20,
        "plan_mib": (folder / PLAN).stat().st_size / 2**20,
        "seconds": seconds,
        "gib_before": before,
        "peak_gib": peak_memory(),
    }


def write_store(root: Path, documents: int, rows: int = 320, chunks: int = 96, hidden: int = 32) -> TraceStore:
    """Traces of random numbers: small files."""
    trace = TraceConfig(chunking=Chunking(tokens=4, sink=1, recent=2), layers=[0], window=8, text_rows=rows, tail=4)
    info = BackboneInfo("made", "made", [0], hidden, hidden, 4 * chunks)
    given = {number: (f"made-{number:07d}", "") for number in range(documents)}
    store = TraceStore.create(
        root, Manifest(backbone=info, trace=trace, documents={"split": "train"}, plan=given, versions={})
    )
    positions = torch.arange(4 * chunks - rows, 4 * chunks)
    generator = torch.Generator().manual_seed(0)
    for number, (name, _) in given.items():
        peak = torch.rand(rows, chunks, 1, generator=generator) / 4
        raw = RawTrace(
            hidden={0: torch.randn(rows, hidden, generator=generator).bfloat16()},
            keys={0: torch.randn(chunks, hidden, generator=generator).half()},
            positions=positions,
            oracle=SparseAttention.from_dense(peak / chunks, peak, (positions + 1) // 4, 8),
            mean_pooled=torch.zeros(rows, chunks).half(),
        )
        span = Span(first=0, last=rows, serve=0, tail=False)
        store.write(number, DocumentMeta(name=name, task="text", length=4 * chunks, spans=[span]), raw)
    return store


def opened(root: Path, loss: str | None) -> dict[str, Any]:
    """Seconds and memory of what `lookahead train` does before its first step; without a loss of reading every byte."""
    from data_gen.traces.validate import check_store
    from indexer_train.config import IndexerConfig, TrainConfig
    from indexer_train.data.mixture import mix
    from indexer_train.training.trainer import prepare, stock_trainer

    before, began = peak_memory(), time.perf_counter()
    store = mix([root])
    listed = time.perf_counter() - began
    if loss is None:
        check_store(store)
    else:
        settings, out = TrainConfig(epochs=1, check_bytes=False, loss=loss), root.with_name(f"run-{loss}")
        stock_trainer(prepare(store, IndexerConfig(heads=4, rank=8), settings, out), settings, out)
    seconds = time.perf_counter() - began
    return {"documents": len(store), "seconds": seconds, "seconds_listing": listed, "gib": peak_memory() - before}


def epoch(root: Path, candidates: str, server: int | None) -> dict[str, Any]:
    """Bytes that the kernel, or the process `server`, read for one epoch of batches, over the bytes of the files."""
    from indexer_train.config import CandidatesConfig
    from indexer_train.data.batches import AllCandidates, DocumentBatchSampler, SampledCandidates, window_index

    store = TraceStore.open(root)
    index, layers, paths = window_index(store), store.manifest.trace.layers, store.paths()
    if candidates == "all":
        collator = AllCandidates(store, layers, 0.05, CandidatesConfig())
    else:
        collator = SampledCandidates(store, layers, 0.05, CandidatesConfig(kind="sampled"), seed=0)
    for path in paths:
        _drop_pages(path)
    before, began, batches = _read_bytes(server), time.perf_counter(), 0
    for rows in DocumentBatchSampler(index, batch_size=1 << 20):
        batch = [index[row] for row in rows]
        collator(batch)
        collator.document.cache_clear()  # the kernel keeps pages of files that are mapped
        _drop_pages(paths[batch[0]["document"]])
        batches += 1
    read = _read_bytes(server) - before
    size = sum(path.stat().st_size for path in paths)
    return {
        "file_system": _file_system(root),
        "documents": batches,
        "mib": size / 2**20,
        "needed_mib": (size - sum(map(_unused, paths))) / 2**20,
        "read_mib": read / 2**20,
        "ratio": read / size,
        "seconds": time.perf_counter() - began,
    }


def _unused(path: Path) -> int:
    """Bytes of a file's baselines, which evaluation reads and no batch."""
    with safe_open(path, "pt") as file:
        parts = [file.get_slice(name).get_shape() for name in file.keys() if name.startswith("baselines.")]  # noqa: SIM118
    return sum(2 * math.prod(shape) for shape in parts)


def _drop_pages(path: Path) -> None:
    """Of a file, from the kernel's memory; a file system in memory keeps them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes(server: int | None) -> int:
    process, field = ("self", "read_bytes") if server is None else (server, "rchar")
    fields = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
    return int(fields[field])


def _file_system(path: Path) -> str:
    """Its kind, as the kernel names it: of the innermost mount that holds `path`."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    held = [(len(place), kind) for place, kind in mounts if path.resolve().is_relative_to(place)]
    return max(held)[1]


def work(out: Path, shard: str) -> dict[str, Any]:
    """One worker's own time over its documents, the model loaded."""
    from data_gen.generate import trace_plan

    own = Shard.of(shard)
    backbone, _ = open_backbone(TINY, own)
    made, began = Plan(out / PLAN), time.perf_counter()
    if not trace_plan(backbone, made, TRACE, out, own, "0", lambda items, _: items, lambda _: None):
        sys.exit(f"{out}: a document could not be traced, failed.jsonl says why")
    return {"seconds": time.perf_counter() - began}


def alone(out: Path) -> dict[str, Any]:
    """Documents a second that the model reads when nothing is kept of them."""
    backbone, _ = open_backbone(TINY, Shard())
    documents = list(Plan(out / PLAN).documents("train"))
    began = time.perf_counter()
    with torch.no_grad():
        for document in documents:
            backbone.model.get_decoder()(torch.tensor([document.tokens]), use_cache=False)
    return {"documents_a_second": len(documents) / (time.perf_counter() - began)}


def workers(folder: Path, documents: int = 120) -> list[dict[str, Any]]:
    """1, 2 and 4 processes on one plan, each time from the start."""
    config = DocumentsConfig(tokens=(900, 1000), train={"text": documents}, heldout={"text": 1}, heldout_share=0.1)
    rows = []
    for count in (1, 2, 4):
        out = folder / str(count)
        plan_documents(TINY, config, TRACE, out)
        model = _called(alone, out)["documents_a_second"]
        seconds = [found["seconds"] for found in _called_at_once(work, [(out, f"{n}/{count}") for n in range(count)])]
        rate = (documents + 1) / max(seconds)
        rows.append({"workers": count, "documents_a_second": rate, "of_the_model_alone": rate / model})
    return rows


def _start(function: Callable[..., Any], *given: Any) -> "subprocess.Popen[str]":
    call = json.dumps([function.__name__, *given], default=str)
    command = [sys.executable, "-m", "benchmarks.scale", "--call", call]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _called_at_once(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    processes = [_start(function, *given) for given in calls]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{function.__name__}: a process failed; what it said is above")
    return [json.loads(each.splitlines()[-1]) for each in printed]


def _called(function: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """What `function` returns in a process of its own; its first argument is a folder."""
    return _called_at_once(function, [given])[0]


CALLED = {function.__name__: function for function in (plan, opened, epoch, work, alone)}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["plan", "open", "epoch", "workers", "estimate"])
    parser.add_argument("--documents", type=int)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--store", type=Path, help="a folder that one worker of `lookahead generate` traces into")
    parser.add_argument(
        "--model", default=load_recipe("smollm2-quickstart").backbone.path, help="whose tokenizer plans"
    )
    parser.add_argument("--folder", type=Path, help="where to work; else a temporary one")
    parser.add_argument("--server", type=int, help="the process that serves the file system of --folder")
    parser.add_argument("--output", type=Path, help=f"else benchmarks/results/{OUTPUT.name}")
    parser.add_argument("--call", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call is not None:
        function, folder, *given = args.call
        print(json.dumps(CALLED[function](Path(folder), *given)))
        return
    if args.part is None:
        parser.error("say which part")
    output = args.output or OUTPUT
    results = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, key = Path(name), args.part
        if args.part == "plan":
            lengths = args.tokens or [1000, 2000]
            found: Any = _called(plan, folder, args.documents or 100_000, lengths, args.model)
            key = f"plan {found['documents']} x {lengths[0]}-{lengths[1]}"
        elif args.part == "open":
            write_store(folder / "train", args.documents or 20_000)
            losses = {"graded labels": "listwise_mass", "golden chunks": "focal", "every byte": None}
            found = {name: _called(opened, folder / "train", loss) for name, loss in losses.items()}
        elif args.part == "epoch":
            write_store(folder / "train", args.documents or 64, rows=320, chunks=4096, hidden=640)
            found = {kind: _called(epoch, folder / "train", kind, args.server) for kind in ("all", "sampled")}
            if kept := [kind for kind, each in found.items() if each["read_mib"] < each["needed_mib"]]:
                sys.exit(f"{folder}: less was read than batches need ({', '.join(kept)}): its file system keeps "
                         "pages or has others read for it; choose another by --folder, or say --server")  # fmt: skip
            key = f"epoch {found['all']['file_system']}"
        elif args.part == "workers":
            found = workers(folder)
        else:
            epochs = [part["found"] for name, part in results.items() if name.startswith("epoch")]
            if not epochs:
                sys.exit(f"{output}: says nothing of an epoch; run python -m benchmarks.scale epoch first")
            ratio = max(each["ratio"] for part in epochs for each in part.values())
            try:
                found = estimate(args.documents or 10_000, (args.tokens or [131072])[0], ratio, args.store)
            except InputError as error:
                sys.exit(str(error))
            key = f"estimate {found[0]['model']}" if args.store else "estimate"
    if args.output or not args.store:
        results[key] = {"origin": origin(), "found": found}
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: found}, indent=1))


if __name__ == "__main__":
    main()
