"""What all losses share: encode the batch, score every chunk per layer, compare with the oracle."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from indexer_train.model import MemoryIndexer


class LossOptions(Strict):
    """What a recipe may set about a loss (`train.loss_options`); most losses have nothing to set."""


@dataclass(frozen=True)
class Targets:
    """The oracle for B windows and N chunks: all of a document's, or those drawn for each window.

    mass, peak: [B, N] (`WindowLabels`); candidate: [B, N] bool; protected_mass: [B], on protected
    chunks; weight: [B, N] of each candidate in a pointwise loss, None for one; most: golden chunks of the window that
    has the most, which a GPU would have to be waited for.
    """

    mass: torch.Tensor
    peak: torch.Tensor
    candidate: torch.Tensor
    protected_mass: torch.Tensor
    weight: torch.Tensor | None = None
    most: int | None = None

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

    pointwise: a mean over single candidates, which can be weighted, and whose scores' sigmoids are probabilities; all
    others train an order; graded: learns from the oracle's degrees, even where nothing is golden. Raises InputError on
    an option that the loss lacks.
    """

    options_type: type[LossOptions] = LossOptions
    options: Any
    """An instance of the class's own `options_type`."""
    pointwise = False
    graded = False
    scoring = torch.float32
    """dtype of the products of queries and keys; a run in bf16 changes it."""

    def __init__(self, model: MemoryIndexer, golden: float, **options: float | bool) -> None:
        """golden: peak (or votes) that makes a chunk golden."""
        super().__init__()
        self.model = model
        self.golden = golden
        try:
            self.options = self.options_type(**options)
        except ValidationError as error:
            first = error.errors()[0]
            known = ", ".join(self.options_type.model_fields) or "none"
            reason = "unknown option" if first["type"] == "extra_forbidden" else first["msg"]
            raise InputError(f"train.loss_options.{first['loc'][0]}: {reason} (options: {known})") from error

    def forward(self, features: list[dict[str, Any]], label: torch.Tensor) -> torch.Tensor:
        """features: query and document features of the collator; label: [B, 5, N] (indexer_train/data/batches.py)."""
        query, document = features
        inner = getattr(self.model, "module", self.model)  # the model itself where it is wrapped for several processes
        queries = self.model(query)["sentence_embedding"]
        with torch.no_grad():  # no parameters: the wrapper, which waits for their gradients, is left out
            keys = inner(document)["sentence_embedding"]
        logits = inner.layer_logits(queries, keys, document.get("chunks"), query.get("candidates"), self.scoring)
        mass, peak, candidate, protected_mass, weight = label.unbind(dim=1)
        targets = Targets(mass, peak, candidate.bool(), protected_mass[:, 0], weight, query.get("most_golden"))
        return self.compute(logits, targets)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the loss learns beside the model, such as a temperature."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("model.")}

    @abstractmethod
    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """logits: [L, B, N] fp32; only candidates may matter. Returns a scalar."""
