"""The Python of docs/engines.md, run as it stands there."""

import re
from pathlib import Path

import torch

from data_gen.core.chunks import Chunking
from data_gen.core.rope import Rope
from eval.serving.entries import V4, encode_entries, entries_to_pages
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget
from indexer_train.spec import IndexerSpec

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
CHUNKS, LAYERS, ENTRIES = 200, 2, 3


def test_the_example_makes_the_chosen_chunks_resident(tmp_path):
    torch.manual_seed(0)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=8, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=list(range(LAYERS)), hidden=24, key_width=32, chunking=Chunking(tokens=4, sink=1, recent=8), window=64,
        backbone="x", key="fp8_rope_hadamard", rope=Rope(dims=16, theta=160000.0, positions=1 << 20),
        selections=[Budget(budget=0.1)],
    )  # fmt: skip
    export_bundle(MemoryIndexer.from_spec(spec, device="cpu"), tmp_path)
    given = {
        "folder": tmp_path,
        "vectors": torch.randn(CHUNKS, LAYERS, 32),
        "hidden": torch.randn(1, LAYERS, 24),
        "positions": torch.tensor([4 * CHUNKS - 1]),
        "entries": torch.randn(CHUNKS, ENTRIES, V4.width),
    }
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, PAGE.name, "exec"), given)
    chosen = given["asked"].row(0)
    assert len(chosen) == 9 + CHUNKS // 10  # the protected chunks and a tenth
    stored = encode_entries(given["entries"])[chosen.long()]
    assert torch.equal(given["resident"], stored) and torch.equal(given["pages"], entries_to_pages(stored[:, 0]))
    assert (given["swap"].fetched, given["swap"].bytes) == (len(chosen), len(chosen) * given["cold"].layout.stride)
