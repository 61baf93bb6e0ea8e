"""Binary cross-entropy in which a golden chunk weighs as much as the oracle insists on it."""

import torch
import torch.nn.functional as F

from indexer_train.losses.base import IndexerLoss, Targets


class VoteWeightedLoss(IndexerLoss):
    """Per layer: BCE against golden or not; a golden chunk weighs its votes (or peak) over the threshold.

    The weight is 1 at the threshold, and grows with the layers that voted or with the head-maximum probability.
    """

    pointwise = True

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        golden = targets.golden(self.golden)
        loss = F.binary_cross_entropy_with_logits(logits, golden.to(logits.dtype).expand_as(logits), reduction="none")
        return targets.mean(loss * torch.where(golden, targets.peak / self.golden, 1.0))
