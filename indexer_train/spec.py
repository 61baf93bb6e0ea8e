"""What an indexer is besides its weights, and where it comes from."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from data_gen.core.chunks import Chunking
from data_gen.core.keys import KeyKind
from data_gen.core.rope import Rope
from indexer_train.config import IndexerConfig
from indexer_train.scoring import PackedQuery
from indexer_train.selection import Cut, Selection, Threshold


class Metric(BaseModel):
    """One measured row. data: documents it was measured on; values: means over windows, documents, tasks."""

    model_config = ConfigDict(extra="forbid")

    data: str
    task: str
    selection: str
    values: dict[str, float]


class Source(BaseModel):
    """A trace store that an indexer learned from.

    documents: settings of its documents; training: how many of them it learned from; weight: how often an epoch read
    them.
    """

    model_config = ConfigDict(extra="forbid")

    documents: dict[str, Any]
    training: int
    weight: float = 1.0


class Provenance(BaseModel):
    """What an indexer was made of and what it then measured.

    backbone: model type; model: its public name (`BackboneInfo`); oracle: who labelled; sources: the
    trace stores; validation: documents held back from all of them; train: the recipe's section; metrics: see Metric.
    """

    model_config = ConfigDict(extra="forbid")

    backbone: str
    model: str | None = None
    oracle: str
    sources: list[Source] = Field(min_length=1)
    validation: int
    train: dict[str, Any]
    metrics: list[Metric] = []

    @property
    def training(self) -> int:
        """Documents it learned from."""
        return sum(source.training for source in self.sources)

    @property
    def traced_from(self) -> str:
        """The backbone by name, where the traces know it, and type."""
        return self.backbone if self.model is None else f"{self.model} ({self.backbone})"


class OutputRow(BaseModel):
    """What the model still said, of one kind of questions or texts.

    task: what was asked, in words; questions, texts: how many; right: the sum of the questions' scores, each 0 to 1, by
    policy; kl: from full attention, nats a text token, by policy; kv_share: resident tokens with the indexer / all;
    kv_mb: resident with it, in 10^6 bytes.
    """

    model_config = ConfigDict(extra="forbid")

    task: str
    questions: int = 0
    texts: int = 0
    right: dict[str, float] = {}
    kl: dict[str, float] = {}
    kv_share: float
    kv_mb: float


class Outputs(BaseModel):
    """What one verb measured with an indexer: on what, by which recipe and commit, where and when (ISO 8601)."""

    model_config = ConfigDict(extra="forbid")

    verb: str
    documents: str
    recipe: str | None
    commit: str | None
    hardware: str
    date: str
    rows: list[OutputRow]


class IndexerSpec(BaseModel):
    """All that an indexer must know besides its weights.

    layers: backbone layers it reads; hidden, key_width: widths there; window: tau; backbone: fingerprint of the model
    whose traces trained it; key, rope: how its keys were made (`BackboneInfo`), queries follow suit;
    selections: ways to choose chunks by their scores, the served one first; provenance: where it comes from; outputs:
    what the model still said with it (`lookahead card`).
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
    outputs: list[Outputs] = []

    @property
    def selection(self) -> Selection:
        """How the indexer is served: what was chosen in training or by `lookahead calibrate`, else the paper's 0.5."""
        return self.selections[0] if self.selections else Threshold(cuts=[Cut(score=0.0)])

    @property
    def packed(self) -> PackedQuery:
        """Where the parts of one layer's packed query lie."""
        shape = self.shape
        return PackedQuery(shape.heads, self.key_width, shape.distance_bumps, shape.scale, shape.slot, shape.bias)
