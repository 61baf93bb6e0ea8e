"""Focal binary cross-entropy on golden chunks, the release's loss, over all candidates."""

import torch
import torch.nn.functional as F

from indexer_train.losses.base import IndexerLoss, Targets

GAMMA = 2.0
"""The release's focusing exponent."""


class FocalLoss(IndexerLoss):
    """Per layer: BCE of each candidate against golden or not, weighed by (1 - p of the truth)^gamma."""

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        golden = (targets.peak >= self.golden).to(logits.dtype).expand_as(logits)
        loss = F.binary_cross_entropy_with_logits(logits, golden, reduction="none")
        focus = (1 - torch.exp(-loss)) ** GAMMA
        weight = targets.candidate.to(logits.dtype).expand_as(logits)
        return (loss * focus * weight).sum() / weight.sum().clamp_min(1)
