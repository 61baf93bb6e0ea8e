"""Softmax cross-entropy to the window's highest head-maximum probability."""

import torch

from indexer_train.losses.base import Targets
from indexer_train.losses.listwise import ListwiseLoss, cross_entropy


class ListwisePeakLoss(ListwiseLoss):
    """Per layer, or joined: softmax over all candidates against the peaks, normalised to one.

    A chunk that one head needs once counts as much as one that many heads read a little: best text fidelity.
    """

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        target = targets.peak / targets.peak.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        return cross_entropy(target, self.scores(logits, targets).log_softmax(dim=-1))
