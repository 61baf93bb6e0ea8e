"""Multi-positive InfoNCE: each golden chunk against all other candidates of its document."""

import math

import torch
from pydantic import PositiveFloat
from torch import nn

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets, mean_over
from indexer_train.model import MemoryIndexer


class ContrastiveOptions(LossOptions):
    """temperature: where the learned temperature starts."""

    temperature: PositiveFloat = 1.0


class ContrastiveLoss(IndexerLoss):
    """Retrieval: each golden chunk against all candidates of its window that are not golden.

    Of a golden chunk p, per layer, with the negatives n of its window and z the logits over a learned temperature:

        -log(e^z_p / (e^z_p + sum_n e^z_n))

    averaged over golden chunks. Golden chunks do not compete with each other.

    Labels: golden, the candidates whose peak (or votes) reaches `train.golden`.
    Requires: a golden chunk in some window. Gains from many negatives: `candidates: {kind: all}`, or a `source` of
    negatives that are hard.
    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding" (arXiv 1807.03748),
    equation 4, for several positives as in Khosla et al. 2020 (arXiv 2004.11362), equation 2, without the other
    positives in the denominator.
    Used by: recipe pocket-v4; the release has no such loss.
    """

    options_type = ContrastiveOptions

    def __init__(self, model: MemoryIndexer, golden: float, **options: float | bool) -> None:
        super().__init__(model, golden, **options)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.options.temperature)))

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        logits = logits / self.log_temperature.exp()
        golden = targets.golden(self.golden)
        negatives = logits.masked_fill(golden | ~targets.candidate, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return mean_over(torch.logaddexp(logits, negatives) - logits, golden)
