"""What an indexer is besides its weights."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from data_gen.core.chunks import Chunking
from data_gen.core.keys import KEY_RECIPES, KeyKind
from data_gen.core.rope import Rope
from indexer_train.card import Provenance
from indexer_train.config import IndexerConfig
from indexer_train.scoring import TILE_ELEMENTS, PackedQuery
from indexer_train.selection import Budget, Cut, Selection, Threshold


class IndexerSpec(BaseModel):
    """All that an indexer must know besides its weights.

    layers: backbone layers it reads; hidden, key_width: widths there; window: tau; backbone: fingerprint of the model
    whose traces trained it; key, rope: how its keys were made (`BackboneInfo`), queries follow suit;
    selections: ways to choose chunks by their scores, the served one first; provenance: where it comes from.
    """

    model_config = ConfigDict(extra="forbid")

    shape: IndexerConfig
    layers: list[int]
    hidden: int
    key_width: int
    chunking: Chunking
    window: PositiveInt
    backbone: str
    key: KeyKind = "mean_pre_rope"
    rope: Rope | None = None
    selections: list[Selection] = []
    provenance: Provenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, values: Any) -> Any:
        """Earlier files say `thresholds`: score by share kept."""
        if isinstance(values, dict) and "thresholds" in values:
            selections = [
                Threshold(target="budget", value=float(share), cuts=[Cut(score=score)])
                for share, score in values["thresholds"].items()
            ]
            return {name: value for name, value in values.items() if name != "thresholds"} | {"selections": selections}
        return values

    @property
    def selection(self) -> Budget | Threshold:
        """How the indexer is served: what was chosen in training or by `lookahead calibrate`, else the paper's 0.5."""
        return self.selections[0] if self.selections else Threshold(cuts=[Cut(score=0.0)])

    @property
    def thresholds(self) -> dict[str, float]:
        """The score that keeps a share of the chunks of contexts of any length, by share."""
        found = [each for each in self.selections if isinstance(each, Threshold) and each.target == "budget"]
        return {str(each.value): each.cuts[0].score for each in found if len(each.cuts) == 1}

    @property
    def packed(self) -> PackedQuery:
        shape = self.shape
        return PackedQuery(shape.heads, self.key_width, shape.distance_bumps, shape.scale, shape.slot, shape.bias)

    def turn(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries [B, H, key_width] at `positions` ([B]) -> the same turned the way the keys are.

        Without a gradient the CPU turns a few at a time, in its cache and in the memory of `query`. Raises InputError
        at positions beyond the backbone's range.
        """
        if query.requires_grad or not query.is_cpu:
            return self._turn(query, positions)
        few = max(1, TILE_ELEMENTS // max(1, query[:1].numel()))
        for part, place in zip(query.split(few), positions.split(few), strict=True):
            part.copy_(self._turn(part, place))
        return query

    def _turn(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.rope is not None:
            query = self.rope.rotate(query, positions[:, None])
        return KEY_RECIPES[self.key].turn(query)
