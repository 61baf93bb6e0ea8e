"""What all losses share: encode the batch, score every chunk per layer, compare with the oracle."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from indexer_train.model import MemoryIndexer


@dataclass(frozen=True)
class Targets:
    """The oracle for B windows and N chunks.

    mass, peak: [B, N] (data_gen/oracle.py WindowLabels); candidate: [B, N] bool; protected: [B], mass elsewhere.
    """

    mass: torch.Tensor
    peak: torch.Tensor
    candidate: torch.Tensor
    protected: torch.Tensor


class IndexerLoss(nn.Module, ABC):
    """A loss on logits [L, B, N]; layers are independent indexers, so their losses are averaged."""

    def __init__(self, model: MemoryIndexer, golden: float) -> None:
        super().__init__()
        self.model = model
        self.golden = golden

    def forward(self, features: list[dict[str, Any]], label: torch.Tensor) -> torch.Tensor:
        """features: query and document features of the collator; label: [B, 4, N]."""
        query, document = features
        queries = self.model(query)["sentence_embedding"]
        keys = self.model(document)["sentence_embedding"]
        inner = getattr(self.model, "module", self.model)  # the model itself when wrapped for several GPUs
        logits = inner.layer_logits(queries, keys)
        mass, peak, candidate, protected = label.unbind(dim=1)
        return self.compute(logits, Targets(mass, peak, candidate.bool(), protected[:, 0]))

    @abstractmethod
    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """logits: [L, B, N] fp32; only candidates may matter. Returns a scalar."""
