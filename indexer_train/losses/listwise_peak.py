"""Softmax cross-entropy to the window's highest head-maximum probability."""

import torch

from indexer_train.losses.base import IndexerLoss, Targets


class ListwisePeakLoss(IndexerLoss):
    """Per layer: softmax over all candidates against the peaks, normalised to one.

    A chunk that one head needs once counts as much as one that many heads read a little: best text fidelity.
    """

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        log_probability = logits.masked_fill(~targets.candidate, -torch.inf).log_softmax(dim=-1)
        target = targets.peak / targets.peak.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        return -torch.where(target > 0, target * log_probability, 0.0).sum(dim=-1).mean()
