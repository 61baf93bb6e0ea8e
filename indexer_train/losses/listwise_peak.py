"""Softmax cross-entropy to the window's highest head-maximum probability."""

import torch

from indexer_train.losses.base import Targets
from indexer_train.losses.listwise import ListwiseLoss, cross_entropy


class ListwisePeakLoss(ListwiseLoss):
    """The chunks that some head needs at some token: better answers and text than from ListwiseMassLoss, less mass.

    Cross-entropy from the window's peaks, normalised to one, to a softmax over its candidates; per layer, with
    r_s = peak_s / sum of peaks:

        -sum_s r_s log(e^z_s / sum_n e^z_n)

    averaged over windows. A chunk that one head needs once counts as much as one that many heads read a little.

    Labels: peak, the window's highest head-maximum probability, averaged over layers.
    Requires: nothing; windows without a golden chunk train too.
    Source: as ListwiseMassLoss; the labels are this project's own.
    """

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        target = targets.peak / targets.peak.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        return cross_entropy(target, self.compared(logits, targets).log_softmax(dim=-1))
