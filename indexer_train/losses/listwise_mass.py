"""Softmax cross-entropy to the window's attention mass, with a slot for what the protected chunks hold."""

import torch
from pydantic import Field

from indexer_train.losses.base import Targets
from indexer_train.losses.listwise import ListwiseLoss, cross_entropy


class ListwiseMassLoss(ListwiseLoss):
    """Per layer, or joined: softmax over all candidates and one slot of logit zero (the score is relative to it).

    Targets are the window's attention probabilities, averaged over heads, layers and tokens; the slot's is what lies
    on protected chunks. The best attention-mass recall among the losses tried.
    """

    class Options(ListwiseLoss.Options):
        """peaks: share of the candidates' mass that is dealt out among them by their peaks instead, as ListwisePeakLoss
        counts them: from this loss (0) to that one, with the protected slot (1)."""

        peaks: float = Field(0.0, ge=0, le=1)

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        logits = self.scores(logits, targets)
        slot = torch.zeros_like(logits[..., :1])
        mass = targets.mass
        if self.options.peaks:
            peak = targets.peak / targets.peak.sum(dim=-1, keepdim=True).clamp_min(1e-12)
            mass = torch.lerp(mass, peak * mass.sum(dim=-1, keepdim=True), self.options.peaks)
        target = torch.cat([targets.protected[:, None], mass], dim=-1)
        return cross_entropy(target, torch.cat([slot, logits], dim=-1).log_softmax(dim=-1))
