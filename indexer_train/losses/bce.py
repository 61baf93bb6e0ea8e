"""Binary cross-entropy on golden chunks."""

import torch
import torch.nn.functional as F
from pydantic import Field

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets


class BceOptions(LossOptions):
    """smoothing: golden counts as 1 - smoothing, the rest as smoothing."""

    smoothing: float = Field(default=0.0, ge=0, lt=0.5)


class BceLoss(IndexerLoss):
    """Plain classification: a score of one half divides what is golden from what is not.

    Of a candidate with logit z and p = sigmoid(z), per layer, where y is 1 - smoothing if golden and else smoothing:

        -y log p - (1 - y) log(1 - p)

    averaged over candidates, each times its weight.

    Labels: golden, the candidates whose peak (or votes) reaches `train.golden`; weight, `candidates.common_weight`.
    Requires: a golden chunk in some window. Made for `candidates: {kind: sampled}`.
    Source: the release's training/train.py, its default; label smoothing as there.
    Used by: recipe pocket-v4-demand, whose fallback needs scores that are probabilities.
    """

    options_type = BceOptions
    pointwise = True

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        smoothing = self.options.smoothing
        golden = targets.golden(self.golden).to(logits.dtype) * (1 - 2 * smoothing) + smoothing
        loss = F.binary_cross_entropy_with_logits(logits, golden.expand_as(logits), reduction="none")
        return targets.mean(loss)
