"""Binary cross-entropy against the oracle's own degree of need."""

import torch
import torch.nn.functional as F

from indexer_train.losses.base import IndexerLoss, Targets


class SoftBceLoss(IndexerLoss):
    """Per layer: BCE of each candidate against its peak over twice the golden threshold, at most 1.

    A chunk at the threshold is a coin's toss, so that a logit of zero still means "golden".
    """

    pointwise = True
    graded = True

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        degree = (targets.peak / (2 * self.golden)).clamp_max(1).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, degree.expand_as(logits), reduction="none")
        return targets.mean(loss)
