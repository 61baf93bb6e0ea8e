"""What listwise losses share: a softmax over the chunks, of each layer or of the layers joined."""

import torch

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets
from indexer_train.scoring import join_layers


class ListwiseOptions(LossOptions):
    """joined: train the one score that the layers are joined to when served, not each layer on its own."""

    joined: bool = False


class ListwiseLoss(IndexerLoss):
    """Cross-entropy between a softmax over the candidates and what the oracle says of them."""

    options_type = ListwiseOptions
    graded = True

    def compared(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Layer logits [L, B, N], or the joined score [1, B, N]; minus infinity where there is no candidate."""
        if self.options.joined:
            logits = join_layers(logits, self.inner.spec.shape.join)[None]
        return logits.masked_fill(~targets.candidate, -torch.inf)


def cross_entropy(target: torch.Tensor, log_probability: torch.Tensor) -> torch.Tensor:
    """Mean over layers and windows. target: [B, N], zero where log_probability [L, B, N] may be infinite."""
    return -torch.where(target > 0, target * log_probability, 0.0).sum(dim=-1).mean()
