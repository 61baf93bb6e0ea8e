"""Selection against sets built one chunk at a time in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.serving.select import Fallback, Limits, Resident, resident_chunks, serve, unchecked_chunks
from indexer_train.selection import Budget, Coverage, Cut, Selection, Threshold


def threshold(score: float) -> Threshold:
    return Threshold(cuts=[Cut(score=score)])


def parts(position: int, chunking: Chunking) -> tuple[list[int], list[int]]:
    """Unprotected and protected chunks at a position."""
    visible = (position + 1) // chunking.tokens
    protected = [c for c in range(visible) if c < chunking.sink or c >= visible - chunking.recent]
    return [c for c in range(visible) if c not in protected], protected


def best_first(scores: np.ndarray, chunks: list[int]) -> list[int]:
    return sorted(chunks, key=lambda c: (-scores[c], c))


def asked(scores: np.ndarray, position: int, chunking: Chunking, rule: Selection) -> list[int]:
    """The rule's chunks, best first."""
    free, _ = parts(position, chunking)
    ranked = best_first(scores, free)
    if isinstance(rule, Budget):
        return ranked[: max(1, int(rule.budget * ((position + 1) // chunking.tokens)))]
    if isinstance(rule, Coverage):
        powers = [math.exp(float(scores[c])) for c in ranked]
        reach = [math.fsum(powers[:count]) >= rule.share * math.fsum(powers) for count in range(len(powers) + 1)]
        return ranked[: reach.index(True)]
    return [c for c in ranked if scores[c] >= rule.cuts[0].score]


def brute_chunks(scores, position, chunking, rule, limits) -> tuple[list[int], int]:
    free, protected = parts(position, chunking)
    wanted = asked(scores, position, chunking, rule)
    count = min(max(len(wanted), limits.floor - len(protected)), limits.cap - len(protected))
    return sorted(protected + best_first(scores, free)[:count]), len(wanted)


def check_row(found: Resident, row: int, expected: list[int], demand: int) -> None:
    assert found.ids.dtype == found.counts.dtype == found.demand.dtype == torch.int32
    assert found.row(row).tolist() == expected
    assert found.ids[row, len(expected) :].eq(-1).all()
    assert int(found.demand[row]) == demand


RULES = st.one_of(
    st.sampled_from([-9.0, -0.5, 0.0, 0.25, 1.0, 9.0]).map(threshold),
    st.sampled_from([0.01, 0.1, 0.5, 1.0]).map(lambda share: Budget(budget=share)),
    st.sampled_from([1e-9, 0.1234567, 0.6180339, 0.9876543, 1.0]).map(lambda share: Coverage(share=share)),
)


@given(st.data())
def test_every_rule_is_the_brute_force_one(data):
    chunking = Chunking(tokens=4, sink=data.draw(st.integers(0, 3)), recent=data.draw(st.integers(0, 70)))
    chunks = data.draw(st.integers(1, 300))
    rows = data.draw(st.integers(1, 3))
    seen = [data.draw(st.integers(0, chunks)) for _ in range(rows - 1)] + [chunks]
    positions = [max(0, 4 * n - 1 + data.draw(st.integers(0, 3))) for n in seen]
    positions = [p if (p + 1) // 4 <= chunks else 4 * chunks - 1 for p in positions]
    steps = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-4, 5, (rows, chunks))  # many ties
    scores = (steps / 4).astype(np.float32)
    rule = data.draw(RULES)
    cap = chunking.sink + chunking.recent + data.draw(st.integers(1, 300))
    limits = Limits(floor=data.draw(st.integers(0, cap)), cap=cap)
    found = resident_chunks(torch.from_numpy(scores), torch.tensor(positions), chunking, rule, limits)
    for row, position in enumerate(positions):
        check_row(found, row, *brute_chunks(scores[row], position, chunking, rule, limits))


def test_a_threshold_follows_the_length_of_its_context():
    rule = Threshold(cuts=[Cut(longest=80, score=0.5), Cut(score=2.0)])
    chunking = Chunking(tokens=4, sink=1, recent=2)
    scores = torch.ones(2, 40)
    found = resident_chunks(scores, torch.tensor([79, 159]), chunking, rule, Limits(cap=40))
    assert found.row(0).tolist() == list(range(20))
    assert found.row(1).tolist() == [0, 38, 39]


def test_refusals():
    chunking = Chunking(tokens=4, sink=1, recent=8)
    scores, place = torch.zeros(1, 20), torch.tensor([79])
    with pytest.raises(InputError, match="cap: 8 chunks cannot hold the 9 protected"):
        resident_chunks(scores, place, chunking, threshold(0.0), Limits(cap=8))
    with pytest.raises(InputError, match="a position sees 21"):
        resident_chunks(scores, torch.tensor([83]), chunking, threshold(0.0), Limits(cap=20))
    with pytest.raises(InputError, match="not \\[sequences, chunks\\]"):
        resident_chunks(scores[0], place, chunking, threshold(0.0), Limits(cap=20))
    damaged = scores.index_fill(1, torch.tensor([5]), torch.nan)
    with pytest.raises(InputError, match="NaN"):
        resident_chunks(damaged, place, chunking, threshold(0.0), Limits(cap=20))
    with pytest.raises(InputError, match="infinite"):
        resident_chunks(damaged.nan_to_num(torch.inf), place, chunking, Coverage(share=0.5), Limits(cap=20))
    for share in (0, 1.1, float("nan")):
        with pytest.raises(ValidationError, match="share"):
            Coverage(share=share)
    with pytest.raises(ValidationError, match="floor must not exceed cap"):
        Limits(floor=5, cap=4)


def test_damage_is_told_once_the_sets_are_asked_for():
    """A row of its own does not hide it, and the sound ones beside it are what they are."""
    chunking, places = Chunking(tokens=4, sink=1, recent=2), torch.tensor([79, 79])
    scores = torch.zeros(2, 20)
    scores[1, 5] = torch.nan
    found = unchecked_chunks(scores, places, chunking, Budget(budget=0.1), Limits(cap=20)).cpu()
    alone = resident_chunks(scores[:1], places[:1], chunking, Budget(budget=0.1), Limits(cap=20))
    assert found.row(0).tolist() == alone.row(0).tolist() and found.demand[0] == alone.demand[0]
    assert found.counts.tolist() == [int(alone.counts), -1]
    with pytest.raises(InputError, match="NaN"):
        found.checked()


@pytest.mark.parametrize(
    ("demand", "ratio", "expected"),
    [(7, 1.0, "demand"), (8, 1.0, "full"), (8, 2.0, "cap"), (17, 2.0, "cap"), (18, 2.0, "full"), (90, None, "cap")],
)
def test_the_two_limits(demand, ratio, expected):
    """A cap of 10 with 3 protected chunks: up to 7 are served as asked, up to ratio * 10 in all by the best."""
    ids = torch.tensor([[0, 3, 9, -1]], dtype=torch.int32)
    resident = Resident(ids, torch.tensor([3]), torch.tensor([demand]))
    fallback = None if ratio is None else Fallback(full_above=ratio)
    chunks, how = serve(resident, 0, 50, 10, 3, fallback)
    assert how == expected and chunks.tolist() == (list(range(50)) if how == "full" else [0, 3, 9])
