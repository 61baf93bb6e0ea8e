"""Validated settings of the indexer and of its training."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_gen.config import Strict


class IndexerConfig(Strict):
    """Shape of the memory indexer, the same for each of its layers.

    heads (H), rank (r): of the query encoder; distance_bumps: bumps on log2 distance, 0 for none; scale: predict a
    factor of the logits from the query; slot: predict the logit of "protected", which the score is relative to; bias:
    learn one constant added to every logit of every layer (a serving engine takes it as its logit offset).
    join: how the layers' logits become one score per chunk.
    """

    heads: PositiveInt
    rank: PositiveInt
    distance_bumps: NonNegativeInt = 12
    scale: bool = True
    slot: bool = True
    bias: bool = False
    join: Literal["sum", "mean", "max"] = "sum"


class TrainConfig(Strict):
    """How the indexer is trained.

    loss: a name of indexer_train/losses; loss_options: what that class lets a recipe set;
    windows_per_document: query tokens of a document in one epoch, which is one batch;
    golden: head-maximum probability (oracle `attention`) or layers (oracle `indexer`) that make a chunk golden;
    validation_every: every n-th document is held back from training to select the checkpoint, by its mass recall when
    `budget` of the chunks are kept;
    eval_epochs: epochs between two such checks; patience: checks without a better one before training stops.
    init: where to take the first weights from instead of drawing them: a folder with a safetensors checkpoint of the
    DeepSeek-V4 backbone (only its indexers are read), or with the release's layer_NN.safetensors files.
    """

    loss: str = "listwise_mass"
    loss_options: dict[str, float] = Field(default_factory=dict)
    epochs: PositiveInt
    windows_per_document: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup: NonNegativeFloat = 0.05
    golden: PositiveFloat = 0.05
    budget: float = Field(0.1, gt=0, le=1)
    validation_every: PositiveInt = 6
    eval_epochs: PositiveInt = 2
    patience: PositiveInt = 5
    seed: int = 0
    init: str | None = None
