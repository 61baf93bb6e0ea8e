"""Speed and memory of importing one dump of the FlashMemory release, beside a plain copy of the file.

Usage: python -m benchmarks.import_dump [--tokens 1500] [--chunks 8000]
Prints the size of the dump, seconds and MB/s of the import and of a copy with fsync, and the growth of the peak
resident set while importing.
"""

import argparse
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import encode_keys
from data_gen.flashmemory.folder import import_dumps

LAYERS = [6, 8, 10, 12, 14, 16, 18, 20]


def write_dump(path: Path, tokens: int, chunks: int) -> None:
    """A dump in the release's format: eight layers, about 100 labels a token."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in LAYERS:
        tensors[f"hidden_layer_{layer}"] = torch.randn(tokens, 4096, generator=generator).bfloat16()
        tensors[f"compk_layer_{layer}"] = encode_keys(torch.randn(chunks, 128, generator=generator))
        tensors[f"positions_layer_{layer}"] = torch.arange(4 * chunks - tokens, 4 * chunks)
    counts = torch.randint(50, 150, (tokens,), generator=generator)
    total = int(counts.sum())
    visible_to_all = chunks - tokens // 4 - 1
    tensors["label_indices"] = torch.randint(0, visible_to_all, (total,), generator=generator).int()
    tensors["label_scores"] = torch.randint(3, 22, (total,), generator=generator).int()
    tensors["label_pointers"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    path.write_bytes(pickle.dumps(tensors, protocol=4))


def peak_memory() -> float:
    """MB, the most this process ever held (Linux)."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1e3


def measure(folder: Path) -> None:
    """Import the folder's dump in this process and print the figures."""
    dump = folder / "doc_00000.pkl"
    trace = TraceConfig(chunking=Chunking(tokens=4), layers=LAYERS, oracle="indexer")
    before = peak_memory()
    start = time.perf_counter()
    report = import_dumps(folder, folder / "store", trace, lambda items, _: items)
    seconds = time.perf_counter() - start
    peak = peak_memory()
    size = dump.stat().st_size / 1e6
    start = time.perf_counter()
    with open(dump, "rb") as source, open(folder / "copy", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
        target.flush()
        os.fsync(target.fileno())
    copying = time.perf_counter() - start
    print(
        f"{report.written} document of {size:.0f} MB: import {seconds:.2f} s ({size / seconds:.0f} MB/s), "
        f"copy {copying:.2f} s ({size / copying:.0f} MB/s), peak memory +{peak - before:.0f} MB"
    )


def main() -> None:
    """Write the dump, then import it in a fresh process, whose peak memory is the import's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--chunks", type=int, default=8000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_dump(Path(folder) / "doc_00000.pkl", arguments.tokens, arguments.chunks)
        subprocess.run([sys.executable, "-m", "benchmarks.import_dump", "--measure", folder], check=True)


if __name__ == "__main__":
    main()
