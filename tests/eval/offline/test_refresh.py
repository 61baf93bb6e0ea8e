"""Refreshing at intervals, token by token and set by set."""

import pytest
import torch

from eval.offline.refresh import analyse_lookahead, chunk_bytes, refresh_windows
from tests.conftest import TINY
from tests.data_gen.traces.spread import spread
from tests.eval.conftest import planted_indexer

GOLDEN, BUDGET = 0.05, 0.1


@pytest.fixture(scope="module")
def found(stores, indexer):
    return analyse_lookahead({"indexer": indexer}, stores[1], GOLDEN, BUDGET)


def brute_force(document, interval):
    """(mass recall, churn, fetched) of recency: attention of each token on what was chosen at its refresh."""
    attention = spread(document.oracle)[0]
    chunking = document.trace.chunking
    mass = needed = fetched = selected = 0.0
    resident = None
    for start, end in refresh_windows(document, interval).tolist():
        position = int(document.positions[start])
        first, last = chunking.candidates(position)
        chosen = set(range(max(first, last - chunking.kept(BUDGET, position)), last))
        for row in range(start, end):
            mass += float(attention[row, list(chosen)].sum())
            needed += float(attention[row, first:last].sum() + document.attention.rest[row])
        if resident is not None:
            fetched += len(chosen - resident)
            selected += len(chosen)
        resident = chosen | set(range(first)) | set(range(last, document.chunks))
    return mass / needed, fetched / selected if selected else None


@pytest.mark.parametrize("interval", [8, 16, 32, 64])
def test_recall_and_churn_of_recency_token_by_token(stores, found, interval):
    texts = [document for document in stores[1] if document.meta.task == "text"]
    slow = [brute_force(document, interval) for document in texts]
    row = next(r for r in found.rows if (r.policy, r.task, r.interval) == ("recency", "text", interval))
    assert row.mass_recall == pytest.approx(sum(recall for recall, _ in slow) / len(slow), abs=1e-5)
    assert row.churn == (None if slow[0][1] is None else pytest.approx(sum(churn for _, churn in slow) / len(slow)))


def test_churn_of_chunks_that_never_stay(planted):
    found = analyse_lookahead({"indexer": planted_indexer()}, planted[1], 0.5, 0.03)  # one chunk of 32
    row = next(r for r in found.rows if (r.policy, r.task, r.interval) == ("oracle", "needles", 8))
    assert row.churn > 0.8  # every token reads a chunk of its own
    assert row.fetched_bytes == row.fetched_chunks * chunk_bytes(planted[1].manifest)
    assert row.bytes_per_token == row.fetched_bytes / 8


def test_every_interval_sees_the_same_tokens_of_a_text(stores):
    for document in stores[1]:
        if document.meta.task == "text":
            span = document.meta.spans[0]
            lengths = {i: int(refresh_windows(document, i).diff(dim=1).sum()) for i in (8, 16, 32, 64)}
            assert set(lengths.values()) == {(span.last - span.first) // 64 * 64}
            assert not len(refresh_windows(document, 128))


def test_decay_adds_up_to_the_window(stores, found):
    decay = [r for r in found.decay if (r.policy, r.task) == ("oracle", "text")]
    assert [r.offset for r in decay] == [0, 8]  # windows of 16 tokens
    whole = next(r for r in found.rows if (r.policy, r.task, r.interval) == ("oracle", "text", 16))
    parts = [r.mass_recall for r in decay]
    assert min(parts) - 0.02 <= whole.mass_recall <= max(parts) + 0.02
    assert all(r.low <= r.mass_recall <= r.high for r in decay)


def test_decay_falls_where_the_future_is_not_foreseen(planted):
    """A chunk is read once: what the native scores find at the first token is worth nothing later."""
    store = planted[1]
    found = analyse_lookahead({"indexer": planted_indexer()}, store, 0.5, 0.1)
    at_8 = {r.policy: r.mass_recall for r in found.rows if r.interval == 8 and r.task == "needles"}
    assert at_8["oracle"] > 1.5 * at_8["exact_attention"] and at_8["indexer"] > at_8["exact_attention"]


def test_bytes_of_a_chunk_are_those_of_its_keys_and_values(stores):
    per_token = 2 * TINY["num_key_value_heads"] * TINY["head_dim"] * 3 * torch.bfloat16.itemsize
    assert chunk_bytes(stores[1].manifest) == 4 * per_token


def test_no_row_of_intervals_longer_than_any_span(found, stores):
    longest = max(span.last - span.serve for document in stores[1] for span in document.meta.spans)
    assert {r.interval for r in found.rows} == {i for i in (8, 16, 32, 64, 128, 256) if i <= longest}


def test_the_traces_own_window_has_a_row_and_a_decay(planted):
    found = analyse_lookahead({"A": planted_indexer(), "B": planted_indexer()}, planted[1], 0.5, 0.1)
    assert {r.policy for r in found.decay} >= {"A", "B", "oracle"}  # windows of 2 tokens
    assert 2 in {r.interval for r in found.rows}
