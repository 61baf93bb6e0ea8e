"""The tiled torch backend against `MemoryIndexer.scores`, which sees all keys at once, and against float64 sums."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import decode_keys, encode_keys, rows_to_pages
from data_gen.core.rope import Rope
from eval.serving.level1 import Level1, PagedKeys, open_level1
from eval.serving.level1_torch import TILE
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Budget, Coverage

CHUNKING = Chunking(tokens=4, sink=1, recent=8)


def make_indexer(join: str = "max", bumps: int = 12, terms: bool = True, paged: bool = True) -> MemoryIndexer:
    """Random weights in every term, the bias and the head weights' signs included."""
    torch.manual_seed(5)
    shape = IndexerConfig(heads=8, rank=16, distance_bumps=bumps, scale=terms, slot=terms, bias=terms, join=join)
    rope = Rope(dims=8, theta=160000.0, positions=1 << 20) if paged else None
    kind = "fp8_rope_hadamard" if paged else "mean_pre_rope"
    spec = IndexerSpec(
        shape=shape, layers=[2, 4, 5], hidden=24, key_width=32, chunking=CHUNKING, window=64, backbone="x", key=kind,
        rope=rope,
    )  # fmt: skip
    indexer = MemoryIndexer.from_spec(spec, device="cpu")
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return indexer.eval()


def inputs(chunks: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [rows, 3, 24] and key rows [chunks, 3, 36]."""
    torch.manual_seed(chunks)
    return torch.randn(rows, 3, 24), encode_keys(torch.randn(chunks, 3, 32))


@pytest.mark.parametrize("join", ["max", "mean", "sum"])
@pytest.mark.parametrize(("bumps", "terms"), [(12, True), (0, False), (5, False), (0, True)])
def test_pages_score_like_the_indexer(join, bumps, terms):
    level1 = Level1(make_indexer(join, bumps, terms), Limits(cap=100))
    hidden, keys = inputs(chunks := TILE + 333)
    positions = torch.tensor([4 * chunks + 1])
    found = level1.joined_scores(level1.pack(hidden, positions), PagedKeys.from_rows(keys))
    expected = level1.indexer.joined_scores(hidden, keys, positions)
    torch.testing.assert_close(found[:, :chunks], expected, atol=1e-5, rtol=1e-5)
    assert found[:, chunks:].eq(-torch.inf).all()
    found = level1.joined_scores(level1.pack(hidden, positions), keys)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pooled_keys_of_a_dense_backbone():
    level1 = Level1(make_indexer("sum", paged=False), Limits(cap=100))
    hidden, _ = inputs(TILE + 5, rows=2)
    keys = torch.randn(TILE + 5, 3, 32).half()
    positions = torch.tensor([4 * len(keys) + 2, 4 * TILE - 1])
    found = level1.joined_scores(level1.pack(hidden, positions), keys)
    expected = level1.indexer.joined_scores(hidden, keys, positions)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :TILE], expected[1, :TILE], atol=1e-5, rtol=1e-5)
    assert found[1, TILE:].eq(-torch.inf).all()


def test_the_terms_are_those_of_the_formula():
    """Float64 NumPy over single products, so that a mistake shared with the indexer would show."""
    level1 = Level1(make_indexer("max", bumps=6), Limits(cap=40))
    hidden, keys = inputs(40)
    queries = level1.pack(hidden, torch.tensor([162]))
    found = level1.joined_scores(queries, PagedKeys.from_rows(keys))[0, :40].numpy()
    values = decode_keys(keys).double().numpy()
    layers = queries[0, :-1].double().numpy().reshape(3, -1)
    for chunk in range(40):
        place = min(max(np.log2(162 - 4 * chunk), 4), 9)
        logits = []
        for layer, packed in enumerate(layers):
            query, weights, bumps, scale, slot, bias = np.split(packed, [256, 264, 270, 271, 272])
            match = np.maximum(query.reshape(8, 32) @ values[chunk, layer], 0) @ weights
            near = sum(u * max(0, 1 - abs(place - centre)) for u, centre in zip(bumps, range(4, 10), strict=True))
            logits.append(np.exp(scale) * (match + near) - slot + bias)
        assert found[chunk] == pytest.approx(max(logits)[0], abs=2e-4, rel=2e-4)


def test_sequences_share_a_pool_in_any_layout():
    """Pages out of order, shared between sequences, in a pool that an engine keeps layer after layer."""
    level1 = Level1(make_indexer(), Limits(cap=64), Budget(budget=0.1))
    hidden, keys = inputs(300, rows=2)
    pool = torch.randint(0, 256, (3, 9, 64 * 36), dtype=torch.uint8)
    table = torch.tensor([[7, 0, 3, 8, 1], [7, 0, 5, -1, -1]], dtype=torch.int32)
    first = torch.stack([rows_to_pages(layer) for layer in keys.unbind(1)])
    second = torch.stack([rows_to_pages(layer) for layer in inputs(170)[1].unbind(1)])
    pool[:, table[0].long()] = first
    pool[:, 5] = second[:, 2]
    other = torch.cat([keys[:128], inputs(170)[1][128:]])
    positions = torch.tensor([1200, 4 * 170 - 1])
    queries = level1.pack(hidden, positions)
    paged = PagedKeys(pool.transpose(0, 1), table)
    resident = level1.resident(queries, paged)
    for row, history in enumerate([keys, other]):
        alone = level1.resident(queries[row : row + 1], PagedKeys.from_rows(history))
        assert torch.equal(resident.row(row), alone.row(0)) and len(alone.row(0)) > 9
    rows = torch.stack(
        [torch.cat([history, history[:0].new_zeros(300 - len(history), 3, 36)]) for history in (keys, other)]
    )
    by_row = level1.resident(queries, rows)
    assert torch.equal(by_row.counts, resident.counts) and torch.equal(by_row.ids, resident.ids)


def test_a_coverage_is_chosen_from_the_joined_scores():
    level1 = open_level1(make_indexer("sum", bumps=0, paged=False), Limits(cap=300), Coverage(share=0.7))
    hidden, keys = inputs(300)[0], 0.05 * torch.randn(300, 3, 32)
    queries = level1.pack(hidden, torch.tensor([1199]))
    scores = level1.joined_scores(queries, keys)[0].double()[1:292]  # between the sink and the newest
    best = scores.argsort(descending=True)
    covered = scores.softmax(dim=0)[best].cumsum(dim=0)
    wanted = 1 + best[: 1 + int((covered < 0.7).sum())]
    resident = level1.resident(queries, keys)
    assert resident.row(0).tolist() == sorted([0, *wanted.tolist(), *range(292, 300)])
    assert resident.demand.tolist() == [len(wanted)] and 1 < len(wanted) < 291


def test_refusals():
    level1 = Level1(make_indexer(), Limits(cap=20))
    hidden, keys = inputs(20)
    queries = level1.pack(hidden, torch.tensor([79]))
    with pytest.raises(InputError, match="cap: 8 chunks cannot hold the 9 protected"):
        Level1(level1.indexer, Limits(cap=8))
    with pytest.raises(InputError, match="keys of 12 chunks, but a position sees 20"):
        level1.joined_scores(queries, keys[:12])
    with pytest.raises(InputError, match="the indexer reads \\[chunks, 3, 36\\]"):
        level1.joined_scores(queries, keys[:, :2])
    with pytest.raises(InputError, match="pages of 64 keys of its 3 layers"):
        level1.joined_scores(queries, PagedKeys.from_rows(keys[:, :2]))
    with pytest.raises(InputError, match="keys of 3 sequences for 1 queries"):
        level1.joined_scores(queries, keys.expand(3, -1, -1, -1))
    with pytest.raises(InputError, match="page table of 1 sequences for 2 queries"):
        level1.joined_scores(queries.expand(2, -1), PagedKeys.from_rows(keys))
    damaged = keys.clone()
    damaged[3, 1, 5] = 0x7F
    with pytest.raises(InputError, match="NaN code"):
        level1.joined_scores(queries, PagedKeys.from_rows(damaged))


def test_backends_by_name(monkeypatch):
    indexer, limits = make_indexer(), Limits(cap=20)
    assert type(open_level1(indexer, limits)) is Level1 and type(open_level1(indexer, limits, None, "torch")) is Level1
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match="triton, which is not installed"):
        open_level1(indexer, limits, backend="triton")


MEMORY = """
import torch
from data_gen.core.chunks import Chunking
from eval.serving.level1 import Level1, PagedKeys
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
spec = IndexerSpec(shape=IndexerConfig(heads=128, rank=8, bias=True, join="max"), layers=[10, 12, 20], hidden=16,
    key_width=128, chunking=Chunking(tokens=4), window=64, backbone="x", key="fp8_rope_hadamard")
level1 = Level1(MemoryIndexer.from_spec(spec, device="cpu"), Limits(cap=24576))
pages = torch.zeros(4096, 3, 8448, dtype=torch.uint8)
pages[..., :8192].random_(0, 127)
pages[..., 8192:] = torch.tensor([0, 0, 128, 63], dtype=torch.uint8).repeat(64)  # scale 1.0
keys = PagedKeys(pages, torch.arange(4096, dtype=torch.int32)[None])
queries = level1.pack(torch.randn(1, 3, 16), torch.tensor([4 * 262144 - 1]))
def kibibytes(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, that of the imports, is forgotten
before = kibibytes("VmRSS")
resident = level1.resident(queries, keys)
print(int(resident.counts[0]), (kibibytes("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_million_tokens_within_600_mib():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    count, mebibytes = map(int, run.stdout.split())
    assert 9 <= count <= 24576 and 0 < mebibytes <= 600
