"""Scores of each query's own candidates, and their gradients, against float64 and autograd."""

import pytest
import torch

from data_gen.core.tensors import lightning_scores
from indexer_train.scoring import TILE_ELEMENTS, CandidateScores


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
