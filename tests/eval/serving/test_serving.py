"""Scoring, selection, pools and fetch as a serving engine uses them: pages of 64 chunks, no model, no Hugging Face."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import PAGE, encode_keys, rows_to_pages
from data_gen.core.rope import Rope
from eval.serving import level2
from eval.serving.entries import EntryShape, encode_entries, entries_to_pages
from eval.serving.level1 import PagedKeys, open_level1
from eval.serving.pools import ColdPool, HotPool, side_lane
from eval.serving.residency import Residency
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle, load_bundle, load_scorer
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget
from indexer_train.spec import IndexerSpec

LAYERS, WIDTH, HEADS, PAGES, MOST = 2, 32, 16, 12, 4
SHAPE = EntryShape(still=64, rope=32)
KEY_BYTES = PAGE * (WIDTH + 4)
UNIT = (LAYERS, KEY_BYTES + SHAPE.page_bytes)
TAIL = 40
"""Chunks in the unfinished last page."""


def history(chunks):
    """Keys and entries as rows: [L, N, bytes] each."""
    generator = torch.Generator().manual_seed(0)
    keys = encode_keys(torch.randn(LAYERS, chunks, WIDTH, generator=generator))
    return keys, encode_entries(torch.randn(LAYERS, chunks, SHAPE.width, generator=generator), SHAPE)


def to_units(keys, entries):
    layers = [
        torch.cat([rows_to_pages(keys[layer]), entries_to_pages(entries[layer], SHAPE)], dim=1)
        for layer in range(LAYERS)
    ]
    return torch.stack(layers, dim=1)


def decode(key_pages, entry_pages, slots, step):
    """One token at one layer: native selection, then attention, over the listed chunks."""
    generator = torch.Generator().manual_seed(step)
    query = torch.randn(1, HEADS, WIDTH, generator=generator)
    scores = level2.score_resident(query, torch.randn(1, HEADS, generator=generator), key_pages, slots)
    chosen = level2.select_resident(scores, slots, 24)
    heads = torch.randn(1, HEADS, SHAPE.width, generator=generator)
    nothing = torch.full((1, 1), level2.NONE)
    return level2.attend(heads, entry_pages, chosen, entry_pages, nothing, torch.zeros(HEADS), 0.2, SHAPE)


def list_chunks(pages, chunks):
    """Pages (or their slots) -> their chunks, without those that the last page lacks."""
    listed = (pages.long()[:, None] * PAGE + torch.arange(PAGE)).flatten()
    return listed[None, : listed.numel() - (-chunks % PAGE)].int()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """An indexer of random weights, exported."""
    torch.manual_seed(2)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=HEADS, rank=8, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=list(range(LAYERS)), hidden=24, key_width=WIDTH, chunking=Chunking(tokens=4, sink=1, recent=8), window=3,
        backbone="x", key="fp8_rope_hadamard", rope=Rope(dims=16, theta=160000.0, positions=1 << 20),
        selections=[Budget(budget=0.1)],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("bundle")
    export_bundle(MemoryIndexer.from_spec(spec, device="cpu"), folder)
    return folder


@pytest.mark.parametrize("lag", [0, 1])
def test_pages_leave_and_return_and_the_output_is_that_of_the_same_set_in_full(lag, bundle):
    """Level 1 of a bundle says which. Every slot starts as NaN bytes; each step writes a chunk into the newest page."""
    chunks = PAGES * PAGE - PAGE + TAIL
    keys, entries = history(chunks + 12)
    whole = to_units(keys, entries)
    cold = ColdPool(UNIT, torch.uint8, pageable=True)
    cold.append(to_units(keys[:, :chunks], entries[:, :chunks]))
    hot = HotPool(2 * MOST, UNIT, torch.uint8, "cpu")
    hot.storage.fill_(255)
    residency = Residency(cold, hot, protected=3, lane=side_lane(hot.device) if lag else None)
    level1 = open_level1(load_scorer(bundle), Limits(cap=10), backend="torch")  # the protected ones and one more
    table = torch.arange(PAGES, dtype=torch.int32)[None]
    random = torch.Generator().manual_seed(1)
    seen = set()
    for step in range(12):
        if step % 3 == 0:
            # What the engine's layers read there; each window asks for something else.
            queries = level1.pack(torch.randn(1, LAYERS, 24, generator=random), torch.tensor([4 * chunks - 1]))
            pages = torch.stack([whole[:, layer, :KEY_BYTES] for layer in range(LAYERS)], dim=1)
            wanted = level1.resident(queries, PagedKeys(pages, table)).row(0).numpy()
            residency.refresh(np.unique(wanted // PAGE))  # this engine moves whole pages, at most MOST
        row = chunks % PAGE
        for layer in range(LAYERS):
            key, entry = keys[layer, chunks], entries[layer, chunks]
            values, scales = SHAPE.value_bytes, SHAPE.scale_bytes
            parts = [
                (row * WIDTH, key[:WIDTH]),
                (PAGE * WIDTH + row * 4, key[WIDTH:]),
                (KEY_BYTES + row * values, entry[:values]),
                (KEY_BYTES + PAGE * values + row * scales, entry[values:]),
            ]
            for start, data in parts:
                residency.write(PAGES - 1, (layer, slice(start, start + data.numel())), data)
        chunks += 1
        in_force = residency.resident
        seen |= set(in_force.units.tolist())
        assert in_force.units[-1] == PAGES - 1
        units = torch.from_numpy(in_force.units)
        for layer in range(LAYERS):
            found, expected = (
                decode(pool[:, layer, :KEY_BYTES], pool[:, layer, KEY_BYTES:], list_chunks(pages, chunks), step)
                for pool, pages in ((hot.slots, in_force.slots), (whole, units))
            )
            assert torch.equal(found, expected) and bool(found.any())
    assert len(seen) > MOST  # pages did move
    if lag:
        residency._ticket.result()
    on_device = np.flatnonzero(residency.table.slot_of >= 0)
    assert len(on_device) < PAGES
    assert torch.equal(torch.stack([cold[unit] for unit in range(PAGES)]), whole)


def test_a_bundle_scores_alike_with_hugging_face_and_without(bundle):
    keys, _ = history(70)
    found = []
    for indexer in (load_scorer(bundle), load_bundle(bundle)):
        level1 = open_level1(indexer, Limits(cap=20), backend="torch")
        hidden = torch.randn(1, LAYERS, 24, generator=torch.Generator().manual_seed(4))
        queries = level1.pack(hidden, torch.tensor([279]))
        found.append(level1.joined_scores(queries, keys.transpose(0, 1).to(queries.device)))
    assert torch.equal(*found)


HEAVY = {"transformers", "sentence_transformers", "datasets", "accelerate"}
SERVE = f"""
import sys, torch
from pathlib import Path
from data_gen.core.key_bytes import encode_keys
import eval.serving.residency, eval.serving.level2
from eval.serving.level1 import PagedKeys, open_level1
from eval.serving.select import Limits
from indexer_train.formats.bundle import load_scorer
level1 = open_level1(load_scorer(Path(sys.argv[1])), Limits(cap=20))
keys = encode_keys(torch.randn(70, {LAYERS}, {WIDTH})).to(level1.indexer.device)
queries = level1.pack(torch.randn(1, {LAYERS}, 24), torch.tensor([279]))
assert 9 < int(level1.resident(queries, PagedKeys.from_rows(keys)).counts[0]) <= 20
sys.exit(sorted({HEAVY!r} & set(sys.modules)) or None)
"""


def test_serving_needs_no_hugging_face(bundle):
    found = subprocess.run([sys.executable, "-c", SERVE, str(bundle)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
