"""The tiled oracle against plain softmax attention, and the windows against loops."""

import pytest
import torch

from data_gen.core.chunks import Chunking
from data_gen.traces import labels as oracle
from data_gen.traces.labels import SparseOracle, pooled_attention
from data_gen.traces.types import SparseAttention
from tests.data_gen.traces.spread import spread


def brute_force(query, key, positions, chunk_tokens, scaling, softcap, sinks):
    heads, length = query.shape[0], key.shape[1]
    result = torch.zeros(heads, len(positions), -(-length // chunk_tokens), dtype=torch.float64)
    for head in range(heads):
        keys = key[head * key.shape[0] // heads].double()
        for row, position in enumerate(positions.tolist()):
            logits = keys[: position + 1] @ query[head, row].double() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            weights = logits.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
            for token in range(position + 1):
                result[head, row, token // chunk_tokens] += weights[token] / total
    return result


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("tile", [1, 100, 1 << 24])
def test_pooled_attention_equals_brute_force(monkeypatch, softcap, with_sinks, tile):
    monkeypatch.setattr(oracle, "CACHE_ELEMENTS", tile)
    torch.manual_seed(0)
    query, key = torch.randn(4, 3, 8), torch.randn(2, 37, 8)
    positions = torch.tensor([0, 20, 36])
    sinks = torch.randn(4) if with_sinks else None
    result = pooled_attention(query, key, positions, 5, 0.4, softcap, sinks)
    expected = brute_force(query, key, positions, 5, 0.4, softcap, sinks)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-5)
    if not with_sinks:
        torch.testing.assert_close(result.sum(-1), torch.ones(4, 3))


def random_attention(tokens=9, chunks=20, layers=3, top=6):
    generator = torch.Generator().manual_seed(1)
    mean = torch.rand(tokens, chunks, layers, generator=generator) / chunks
    peak = mean * (1 + torch.rand(tokens, chunks, layers, generator=generator))
    visible = torch.arange(chunks - tokens, chunks)
    return mean, peak, visible, SparseAttention.from_dense(mean, peak, visible, top)


def test_sparse_attention_keeps_the_top_and_accounts_for_the_rest():
    mean, peak, visible, sparse = random_attention()
    dense_mean, dense_peak = spread(SparseOracle.of(sparse, 20))
    for row in range(9):
        order = peak[row, : visible[row]].mean(-1).argsort(descending=True)
        kept = sorted(order[:6].tolist())
        start, end = sparse.pointers[row : row + 2].tolist()
        assert sparse.chunks[start:end].tolist() == kept
        torch.testing.assert_close(dense_mean[row, kept], mean[row, kept].mean(-1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(dense_peak[row, kept], peak[row, kept].mean(-1), atol=1e-4, rtol=1e-3)
        total = mean[row, : visible[row]].mean(-1).sum()
        torch.testing.assert_close(dense_mean[row].sum() + sparse.rest[row], total, atol=1e-3, rtol=1e-3)


def test_window_labels_equal_loops():
    mean, peak, _, sparse = random_attention()
    mean, peak = spread(SparseOracle.of(sparse, 20))
    chunking = Chunking(tokens=4, sink=1, recent=2)
    positions = torch.arange(43, 52)
    windows = torch.tensor([[0, 4], [3, 9], [8, 9]])
    labels = SparseOracle.of(sparse, 20).labels(windows, positions, chunking)
    for index, (first, last) in enumerate(windows.tolist()):
        candidates = range(*chunking.candidates(int(positions[first])))
        for chunk in range(20):
            inside = chunk in candidates
            assert bool(labels.candidate[index, chunk]) == inside
            mass = sum(float(mean[row, chunk]) for row in range(first, last)) / (last - first) if inside else 0.0
            highest = max(float(peak[row, chunk]) for row in range(first, last)) if inside else 0.0
            assert abs(float(labels.mass[index, chunk]) - mass) < 1e-6
            assert abs(float(labels.peak[index, chunk]) - highest) < 1e-6
    assert torch.equal(labels.golden(0.05), labels.candidate & (labels.peak >= 0.05))
