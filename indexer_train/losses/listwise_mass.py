"""Softmax cross-entropy to the window's attention mass, with a slot for what the protected chunks hold."""

import torch

from indexer_train.losses.base import Targets
from indexer_train.losses.listwise import ListwiseLoss, cross_entropy


class ListwiseMassLoss(ListwiseLoss):
    """Per layer, or joined: softmax over all candidates and one slot of logit zero (the score is relative to it).

    Targets are the window's attention probabilities, averaged over heads, layers and tokens; the slot's is what lies
    on protected chunks. The best attention-mass recall among the losses tried.
    """

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        logits = self.scores(logits, targets)
        slot = torch.zeros_like(logits[..., :1])
        target = torch.cat([targets.protected[:, None], targets.mass], dim=-1)
        return cross_entropy(target, torch.cat([slot, logits], dim=-1).log_softmax(dim=-1))
