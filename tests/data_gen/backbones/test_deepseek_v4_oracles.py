"""The tracer's check of itself: near-ties at the cut are counted, any other difference is refused."""

import pytest
import torch

from data_gen.backbones.deepseek_v4 import count_near_ties
from data_gen.core.errors import InputError


def picks_of(scores, visible, k):
    """The k best visible chunks, in plain Python."""
    pairs = zip(scores.tolist(), visible, strict=True)
    best = [sorted(range(seen), key=lambda n, row=row: -row[n])[:k] for row, seen in pairs]
    return torch.tensor([row + [-1] * (k - len(row)) for row in best])


def test_near_ties_are_counted_and_nothing_else_passes():
    scores = torch.tensor([[5.0, 4.0, 3.0, 3.0 - 1e-4, 1.0, 9.0]] * 4)
    visible = torch.tensor([5, 5, 2, 5])
    picks = picks_of(scores, visible.tolist(), 3)
    assert picks[2].tolist() == [0, 1, -1]
    assert count_near_ties(scores, visible, picks, "here") == 0
    assert count_near_ties(scores[:, :0], visible * 0, picks[:, :0], "here") == 0
    tied = picks.clone()
    tied[0, 2] = tied[3, 2] = 3  # within 1e-4 of the largest visible magnitude
    assert count_near_ties(scores, visible, tied, "here") == 2
    for row, place, chunk in ((1, 2, 4), (1, 0, 3), (1, 2, 5), (2, 2, 2), (2, 1, -1), (0, 2, -1)):
        wrong = picks.clone()
        wrong[row, place] = chunk
        with pytest.raises(InputError, match=r"here: the recomputed top-3 differs .* at 1 tokens"):
            count_near_ties(scores, visible, wrong, "here")
