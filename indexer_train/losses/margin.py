"""Pairwise hinge over all (golden, other) pairs of a window, exact in O(N log N)."""

import torch
from pydantic import PositiveFloat

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets


class MarginOptions(LossOptions):
    """margin: how far golden chunks must lead, in logits."""

    margin: PositiveFloat = 1.0


class MarginLoss(IndexerLoss):
    """Ranking: every golden chunk above every other candidate of its window, by a margin and no more.

    Over all pairs of a golden chunk p and another candidate n of one window, per layer:

        max(0, margin - z_p + z_n)

    averaged over the pairs. Sorted logits and their running sums give each golden chunk the count and the sum of the
    negatives inside its margin, so that no [B, N, N] table is ever built.

    Labels: golden, the candidates whose peak (or votes) reaches `train.golden`.
    Requires: a golden chunk in some window.
    Source: Herbrich et al. 2000, "Large Margin Rank Boundaries for Ordinal Regression"; the release's
    training/train.py, --pairwise-loss margin.
    Used by: no shipped recipe; kept so that the release's runs can be repeated.
    """

    options_type = MarginOptions

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        golden = targets.golden(self.golden).expand_as(logits)
        negative = (targets.candidate & ~targets.golden(self.golden)).expand_as(logits)
        ordered = logits.masked_fill(~negative, -torch.inf).sort(dim=-1, descending=True).values
        counts = negative.sum(dim=-1, keepdim=True)
        present = torch.arange(logits.shape[-1], device=logits.device) < counts
        sums = torch.nn.functional.pad(torch.where(present, ordered, 0.0).cumsum(dim=-1), (1, 0))
        bound = (logits - self.options.margin).detach()
        inside = torch.searchsorted(-ordered.detach(), -bound)  # negatives with z_n > z_p - margin
        hinge = inside * (self.options.margin - logits) + sums.gather(-1, inside)
        pairs = (golden * counts).sum()
        return torch.where(golden, hinge, 0.0).sum() / pairs.clamp_min(1)
