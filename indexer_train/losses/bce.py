"""Binary cross-entropy on golden chunks."""

import torch
import torch.nn.functional as F
from pydantic import Field

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets


class BceLoss(IndexerLoss):
    """Per layer: BCE of each candidate against golden or not."""

    pointwise = True

    class Options(LossOptions):
        """smoothing: golden counts as 1 - smoothing, the rest as smoothing."""

        smoothing: float = Field(0.0, ge=0, lt=0.5)

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        smoothing = self.options.smoothing
        golden = targets.golden(self.golden).to(logits.dtype) * (1 - 2 * smoothing) + smoothing
        loss = F.binary_cross_entropy_with_logits(logits, golden.expand_as(logits), reduction="none")
        return targets.mean(loss)
