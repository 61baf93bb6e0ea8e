"""Binary cross-entropy in which a golden chunk weighs as much as the oracle insists on it."""

import torch
import torch.nn.functional as F

from indexer_train.losses.base import IndexerLoss, Targets


class VoteWeightedLoss(IndexerLoss):
    """Classification in which a chunk counts by how much it was needed.

    Of a candidate with logit z and p = sigmoid(z), per layer, where t is `train.golden`:

        golden:   -(peak / t) log p
        other:    -log(1 - p)

    averaged over candidates, each times its weight. A chunk at the threshold counts once; one that more layers voted
    for, or that has a higher head-maximum probability, counts in proportion.

    Labels: golden, the candidates whose peak (or votes) reaches t; peak; weight, `candidates.common_weight`.
    Requires: a golden chunk in some window. Made for traces of the oracle `indexer`, whose peaks are votes.
    Source: the release's training/train.py, --weighted-loss.
    Used by: no shipped recipe; kept so that the release's runs can be repeated.
    """

    pointwise = True

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        golden = targets.golden(self.golden)
        loss = F.binary_cross_entropy_with_logits(logits, golden.to(logits.dtype).expand_as(logits), reduction="none")
        return targets.mean(loss * torch.where(golden, targets.peak / self.golden, 1.0))
