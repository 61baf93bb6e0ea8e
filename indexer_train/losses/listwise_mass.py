"""Softmax cross-entropy to the window's attention mass, with a slot for what the protected chunks hold."""

import torch

from indexer_train.losses.base import Targets
from indexer_train.losses.listwise import ListwiseLoss, cross_entropy


class ListwiseMassLoss(ListwiseLoss):
    """The share of attention that each chunk will get: the best attention-mass recall among the losses tried.

    Cross-entropy from the window's attention mass m to a softmax over its candidates and one slot of logit zero, which
    stands for the protected chunks (the logits are relative to it); per layer:

        -m_protected log(1 / Z) - sum_s m_s log(e^z_s / Z),    Z = 1 + sum_s e^z_s

    averaged over windows.

    Labels: mass, attention probability averaged over heads, layers and the window's tokens; protected_mass, that on
    protected chunks.
    Requires: nothing; windows without a golden chunk train too. Best with `indexer.slot`, and all candidates.
    Source: the top-one cross-entropy of Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise
    Approach" (ListNet), with attention for relevance; the slot is this project's own.
    """

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        logits = self.compared(logits, targets)
        slot = torch.zeros_like(logits[..., :1])
        target = torch.cat([targets.protected_mass[:, None], targets.mass], dim=-1)
        return cross_entropy(target, torch.cat([slot, logits], dim=-1).log_softmax(dim=-1))
