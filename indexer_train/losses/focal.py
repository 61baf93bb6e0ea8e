"""Focal binary cross-entropy on golden chunks, the release's loss."""

import torch
import torch.nn.functional as F
from pydantic import Field

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets


class FocalOptions(LossOptions):
    """gamma: focus on what is still wrong; alpha: weight of golden chunks, 1 - alpha of the others (None: equal);
    smoothing: golden counts as 1 - smoothing, the rest as smoothing."""

    gamma: float = Field(default=2.0, ge=0)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    smoothing: float = Field(default=0.0, ge=0, lt=0.5)


class FocalLoss(IndexerLoss):
    """The release's loss: golden or not, with the weight on candidates that are still scored wrongly.

    Of a candidate with logit z and p = sigmoid(z), per layer:

        golden:   -alpha (1 - p)^gamma log p
        other:    -(1 - alpha) p^gamma log(1 - p)

    without the factors of alpha where it is None; averaged over candidates, each times its weight.

    Labels: golden, the candidates whose peak (or votes) reaches `train.golden`; weight, `candidates.common_weight`.
    Requires: a golden chunk in some window. Made for `candidates: {kind: sampled}`: among all chunks golden ones are
    a few in a hundred.
    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection" (arXiv 1708.02002), equations 4 and 5; the
    release's training/train.py, --focal-loss.
    Used by: recipes deepseek-v4-flash and pocket-v4-votes, which train as the release does.
    """

    options_type = FocalOptions
    pointwise = True

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
