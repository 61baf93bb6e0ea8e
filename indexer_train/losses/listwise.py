"""What listwise losses share: a softmax over the chunks."""

import torch

from indexer_train.losses.base import IndexerLoss, Targets


class ListwiseLoss(IndexerLoss):
    """Cross-entropy between a softmax over the candidates and what the oracle says of them."""

    graded = True

    @staticmethod
    def compared(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Logits [L, B, N], minus infinity where there is no candidate."""
        return logits.masked_fill(~targets.candidate, -torch.inf)


def cross_entropy(target: torch.Tensor, log_probability: torch.Tensor) -> torch.Tensor:
    """Mean over layers and windows. target: [B, N], zero where log_probability [L, B, N] may be infinite."""
    return -torch.where(target > 0, target * log_probability, 0.0).sum(dim=-1).mean()
