"""What all losses share: encode the batch, score every chunk per layer, compare with the oracle."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from data_gen.config import Strict
from data_gen.errors import InputError
from indexer_train.model import MemoryIndexer


class LossOptions(Strict):
    """What a recipe may set about a loss (`train.loss_options`); most losses have nothing to set."""


@dataclass(frozen=True)
class Targets:
    """The oracle for B windows and N chunks: all of a document's, or those drawn for each window.

    mass, peak: [B, N] (data_gen/oracle.py WindowLabels); candidate: [B, N] bool; protected: [B], mass on protected
    chunks; weight: [B, N] of each candidate in a pointwise loss, None for one.
    """

    mass: torch.Tensor
    peak: torch.Tensor
    candidate: torch.Tensor
    protected: torch.Tensor
    weight: torch.Tensor | None = None

    def golden(self, threshold: float) -> torch.Tensor:
        """[B, N] bool: candidates whose peak reaches `threshold`."""
        return self.candidate & (self.peak >= threshold)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the candidates of a pointwise loss [L, B, N], each times its weight."""
        return mean_over(values if self.weight is None else values * self.weight, self.candidate)


def mean_over(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` [L, B, N] where `mask` [B, N] holds; zero when it holds nowhere."""
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


class IndexerLoss(nn.Module, ABC):
    """A loss on logits [L, B, N]; layers are independent indexers, so their losses are averaged.

    pointwise: a mean over single candidates, which can be weighted.
    """

    Options = LossOptions
    pointwise = False

    def __init__(self, model: MemoryIndexer, golden: float, **options: float) -> None:
        """golden: peak (or votes) that makes a chunk golden. Raises InputError on an option that the loss lacks."""
        super().__init__()
        self.model = model
        self.golden = golden
        try:
            self.options = self.Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            known = ", ".join(self.Options.model_fields) or "none"
            raise InputError(f"train.loss_options.{first['loc'][0]}: {first['msg']} (options: {known})") from error

    def forward(self, features: list[dict[str, Any]], label: torch.Tensor) -> torch.Tensor:
        """features: query and document features of the collator; label: [B, 5, N] (indexer_train/batches.py)."""
        query, document = features
        queries = self.model(query)["sentence_embedding"]
        keys = self.model(document)["sentence_embedding"]
        inner = getattr(self.model, "module", self.model)  # the model itself when wrapped for several GPUs
        logits = inner.layer_logits(queries, keys, document.get("chunks"), query.get("candidates"))
        mass, peak, candidate, protected, weight = label.unbind(dim=1)
        return self.compute(logits, Targets(mass, peak, candidate.bool(), protected[:, 0], weight))

    @abstractmethod
    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """logits: [L, B, N] fp32; only candidates may matter. Returns a scalar."""
