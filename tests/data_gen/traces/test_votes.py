"""The indexer oracle against the release's rule written out in plain Python."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.traces.labels import SparseOracle, native_picks
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, GoldenChunks, Manifest, RawTrace, Span
from indexer_train.measure.metrics import golden_recall, mass_recall, served_windows
from indexer_train.scoring import select


def release_rule(logits, visible, top_k):
    """One row: the picks as a set, in float64."""
    order = sorted(range(visible), key=lambda n: -logits[n])[:top_k]
    if not order:
        return set()
    weights = [math.exp(logits[n] - logits[order[0]]) for n in order]
    cumulated, picks = 0.0, {order[0]}
    for rank, n in enumerate(order):
        cumulated += weights[rank] / sum(weights)
        if rank and cumulated <= 0.6:
            picks.add(n)
        elif rank:
            return picks | {n}  # the crossing one; also when the first alone was already over
    return picks


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 50), st.floats(0.05, 6))
def test_picks_follow_the_rule(seed, chunks, top_k, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, chunks, generator=generator) * spread
    visible = torch.randint(0, chunks + 1, (5,), generator=generator)
    picks = native_picks(logits, visible, top_k)
    for row in range(5):
        expected = release_rule(logits[row].double().tolist(), int(visible[row]), top_k)
        assert set(picks[row].nonzero().flatten().tolist()) == expected


def test_a_dominant_first_takes_the_second_along():
    logits = torch.tensor([[9.0, 0.0, 1.0, -1.0]])
    assert native_picks(logits, torch.tensor([4]), 4).tolist() == [[True, False, True, False]]
    assert native_picks(logits, torch.tensor([1]), 4).tolist() == [[True, False, False, False]]


def golden_rows():
    """Three tokens, N = 8: {1: 3 votes, 6: 5}, {}, {1: 4, 2: 3, 7: 21}."""
    votes = torch.zeros(3, 8, dtype=torch.int64)
    votes[0, [1, 6, 4]] = torch.tensor([3, 5, 2])  # two votes are too few
    votes[2, [1, 2, 7]] = torch.tensor([4, 3, 21])
    return votes


def test_votes_become_csr_and_pieces_join():
    votes = golden_rows()
    golden = GoldenChunks.from_votes(votes, 3)
    assert golden.pointers.tolist() == [0, 2, 2, 5]
    assert golden.chunks.tolist() == [1, 6, 1, 2, 7]
    assert golden.votes.tolist() == [3, 5, 4, 3, 21]
    joined = GoldenChunks.concatenate([GoldenChunks.from_votes(votes[:1], 3), GoldenChunks.from_votes(votes[1:], 3)])
    assert all(torch.equal(a, b) for a, b in zip(vars(golden).values(), vars(joined).values(), strict=True))


def test_window_labels_pool_votes():
    chunking = Chunking(tokens=4, sink=1, recent=1)
    positions = torch.tensor([27, 28, 29])  # 7 visible chunks: candidates are 1..5
    windows = torch.tensor([[0, 1], [0, 3], [1, 2]])
    labels = SparseOracle.of(GoldenChunks.from_votes(golden_rows(), 3), 8).labels(windows, positions, chunking)
    assert labels.candidate.tolist() == [[False] + [True] * 5 + [False] * 2] * 3
    assert labels.peak[1].tolist() == [0, 4, 3, 0, 0, 0, 0, 0]
    torch.testing.assert_close(labels.mass[0], torch.tensor([0, 3 / 8, 0, 0, 0, 0, 0, 0]))  # 6 is protected
    torch.testing.assert_close(labels.mass[1], torch.tensor([0, 7 / 36, 3 / 36, 0, 0, 0, 0, 0]))
    assert not labels.mass[2].any() and not labels.rest.any()
    assert torch.equal(labels.golden(0.05), labels.peak > 0)
    selected = torch.tensor([[False, True] + [False] * 6] * 3)
    recall = mass_recall(selected, labels)
    torch.testing.assert_close(recall[:2], torch.tensor([1.0, 0.7]))
    assert recall[2].isnan() and golden_recall(selected, labels, 0.05)[2].isnan()


def test_a_store_of_votes_reads_back(tmp_path):
    trace = TraceConfig(chunking=Chunking(tokens=4, sink=1, recent=1), layers=[3], oracle="indexer", window=2, tail=1,
                        text_rows=2)  # fmt: skip
    info = BackboneInfo("deepseek_v4", "x", [0, 3], 4, 8, 64, key="fp8_rope_hadamard")
    store = TraceStore.create(
        tmp_path, Manifest(backbone=info, trace=trace, documents={}, plan={4: ("a", "")}, versions={})
    )
    meta = DocumentMeta(
        name="a", task="chat", length=34, spans=[Span(first=0, last=3, serve=0, tail=True)], near_ties=2
    )
    raw = RawTrace(
        hidden={3: torch.zeros(3, 4).bfloat16()},
        keys={3: torch.zeros(8, 12, dtype=torch.uint8)},
        positions=torch.tensor([27, 28, 29]),
        oracle=GoldenChunks.from_votes(golden_rows(), 3),
    )
    store.write(4, meta, raw, source={"prompt": "é", "rid": "r"})
    (document,) = TraceStore.open(tmp_path)
    assert document.meta == meta and document.source == {"prompt": "é", "rid": "r"}
    assert document.chunks == 8 and document.mean_pooled is None and document.native(3) == {}
    (served,) = served_windows(iter([document]))
    chosen = select(served.labels.mass, served.labels.candidate, torch.ones(len(served.windows), dtype=torch.int64))
    assert served.windows.tolist() == [[0, 2], [2, 3]]
    torch.testing.assert_close(mass_recall(chosen, served.labels), torch.tensor([1.0, 4 / 7]))
