"""Scores of each query's own candidates, and their gradients, against float64 and autograd; shares of a softmax
against decimals of 60 digits."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from data_gen.core.tensors import lightning_scores
from indexer_train.scoring import TILE_ELEMENTS, CandidateScores, covering, remaining


@pytest.mark.parametrize(
    ("queries", "heads", "candidates"),
    [
        (5, 3, 7),  # one tile
        (9, 16, TILE_ELEMENTS // 64),  # tiles of four queries, and a last one of one
        (3, 16, TILE_ELEMENTS // 16 + 1),  # a query alone is larger than a tile
        (1, 2, 0),
        (0, 2, 3),
    ],
)
def test_scores_and_gradients_whatever_the_tiles(queries, heads, candidates):
    rng = torch.Generator().manual_seed(0)
    query, weights = torch.randn(queries, heads, 16, generator=rng), torch.randn(queries, heads, generator=rng)
    keys = torch.randn(50, 48, generator=rng)[:, 16:32]
    chosen = torch.randint(50, (queries, candidates), generator=rng)
    slope = torch.randn(queries, candidates, generator=rng)
    found = []
    for dtype in (torch.float32, torch.float64):
        given = [value.to(dtype, copy=True).requires_grad_() for value in (query, weights)]
        if dtype == torch.float32:
            scores = CandidateScores.apply(*given, keys, chosen)
        else:
            scores = lightning_scores(*given, keys.double()).gather(1, chosen)
        (scores * slope).sum().backward()
        found.append([scores, *(value.grad for value in given)])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own.double(), expected, atol=1e-3, rtol=1e-4)


def exact_shares(scores, candidate):
    """(candidates of one row, best first; what of the softmax each has together with those after it), 60 digits."""
    order = sorted(np.flatnonzero(candidate).tolist(), key=lambda chunk: (-scores[chunk], chunk))
    with localcontext() as context:
        context.prec = 60
        powers = [Decimal(float(scores[chunk])).exp() for chunk in order]
        whole = sum(powers)
        return order, [sum(powers[place:]) / whole for place in range(len(order))]


@given(st.data())
def test_the_fewest_best_candidates_that_reach_a_share(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    chunks, spread = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0.1, 1.0, 8.0, 60.0]))
    scores = (rng.integers(-40, 41, (2, chunks)) * spread / 40).astype(np.float32)  # with ties
    candidate = rng.random((2, chunks)) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    share = data.draw(st.one_of(st.floats(0, 1, exclude_min=True), st.just(1.0)))
    given = torch.from_numpy(scores), torch.from_numpy(candidate)
    marked, rest = covering(*given, share), remaining(*given)
    for row in range(2):
        order, left = exact_shares(scores[row], candidate[row])
        assert rest[row, order].tolist() == pytest.approx([float(value) for value in left], rel=1e-12, abs=0)
        assert not rest[row, ~given[1][row]].any()
        assume(all(abs(float(value) - (1 - share)) > 1e-14 for value in left) or share == 1)
        # What is left out is little enough.
        reached = [value <= 1 - Decimal(share) for value in [*left[1:], Decimal(0)]]
        count = reached.index(True) + 1 if order else 0
        assert sorted(order[:count]) == marked[row].nonzero().flatten().tolist()


@given(st.floats(1e-300, 1.0), st.integers(-8, 8))
def test_a_constant_added_to_all_scores_changes_no_coverage(share, constant):
    scores = torch.randint(-40, 41, (3, 50), generator=torch.Generator().manual_seed(1)) / 8.0
    candidate = torch.arange(50) < torch.tensor([[50], [7], [0]])
    found = covering(scores, candidate, share)
    assert torch.equal(covering(scores + constant, candidate, share), found)
    assert found.any(dim=1).tolist() == [True, True, False]
    assert not (found & ~covering(scores, candidate, min(1.0, 1.5 * share))).any()
