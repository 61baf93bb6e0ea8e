"""Multi-positive InfoNCE: each golden chunk against all other candidates of its document."""

import math

import torch
from pydantic import PositiveFloat
from torch import nn

from indexer_train.losses.base import IndexerLoss, LossOptions, Targets, mean_over
from indexer_train.model import MemoryIndexer


class ContrastiveLoss(IndexerLoss):
    """Per layer: -log(e^z_p / (e^z_p + sum over negatives e^z_n)), averaged over the golden chunks p.

    Golden chunks do not compete with each other. Logits are divided by a learned temperature.
    """

    class Options(LossOptions):
        """temperature: where the learned temperature starts."""

        temperature: PositiveFloat = 1.0

    def __init__(self, model: MemoryIndexer, golden: float, **options: float | bool) -> None:
        super().__init__(model, golden, **options)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(self.options.temperature)))

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        logits = logits / self.log_temperature.exp()
        golden = targets.golden(self.golden)
        negatives = logits.masked_fill(golden | ~targets.candidate, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return mean_over(torch.logaddexp(logits, negatives) - logits, golden)
