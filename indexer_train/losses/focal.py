"""Focal binary cross-entropy on golden chunks, the release's loss."""

import torch
import torch.nn.functional as F
from pydantic import Field

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets


class FocalLoss(IndexerLoss):
    """Per layer: BCE of each candidate against golden or not, weighed by (1 - p of the truth)^gamma."""

    pointwise = True

    class Options(LossOptions):
        """gamma: focus on what is still wrong; alpha: weight of golden chunks, 1 - alpha of the others (None: equal);
        smoothing: golden counts as 1 - smoothing, the rest as smoothing."""

        gamma: float = Field(2.0, ge=0)
        alpha: float | None = Field(None, gt=0, lt=1)
        smoothing: float = Field(0.0, ge=0, lt=0.5)

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        gamma, alpha, smoothing = self.options.gamma, self.options.alpha, self.options.smoothing
        golden = targets.golden(self.golden)
        wrong = torch.where(golden, -logits, logits)  # how far the logit leans to the wrong side
        loss = F.softplus(wrong)
        factor = torch.exp(gamma * (wrong - loss))  # sigmoid(wrong)^gamma, whose own slope is infinite for gamma < 1
        loss = (loss - smoothing * wrong) * factor
        if alpha is not None:
            loss = loss * torch.where(golden, alpha, 1 - alpha)
        return targets.mean(loss)
