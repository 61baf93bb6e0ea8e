"""Validated settings of a pocket recipe: model shape, vocabulary, training stages, evaluation."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_gen.core.config import Strict


class VocabularyConfig(Strict):
    """Sizes of the word classes. Keys and names are asked for, values are answered, ordinals number the steps."""

    keys: PositiveInt
    names: PositiveInt
    values: int = Field(gt=0, le=900)
    ordinals: int = Field(gt=1, le=10)


class OptimizerConfig(Strict):
    """Muon for the matrices of the layers, AdamW for the rest: plain AdamW learns rare key-value pairs far slower.

    Backbone and indexer are clipped apart: the indexer sees detached inputs and its own loss only.
    """

    betas: tuple[float, float]
    weight_decay: float
    clip: PositiveFloat
    warmup: PositiveInt
    matrix_lr: PositiveFloat = Field(description="Muon's factor on the stage's learning rate")
    indexer_lr: PositiveFloat = Field(description="the indexer's factor on the stage's learning rate")


class LossConfig(Strict):
    """text: weight of plain next-word loss. indexer: weight of the KL. answer_rows: share of the KL on answer rows."""

    text: float = Field(ge=0)
    indexer: PositiveFloat
    answer_rows: float = Field(gt=0, lt=1)


class StageConfig(Strict):
    """`steps` optimizer steps on documents of `length` tokens; `lr` falls linearly from its first to its second value.

    sparse: attention sees the indexer's top-k only; otherwise every visible entry.
    advance_at: go on early once the share of right words in answers to `multi_key` over the last 50 steps reaches it.
    Other tasks are not asked. Of several values in any order no more than a part of the words can be foretold; tracking
    and copy could be asked, but the committed recipes, and the models trained by them, ended their stages without.
    """

    length: int = Field(gt=0, multiple_of=64)
    batch: PositiveInt
    steps: PositiveInt
    lr: tuple[PositiveFloat, PositiveFloat]
    sparse: bool
    advance_at: float | None = None


class EvaluationConfig(Strict):
    """documents: per task and length; the first `comparisons` of them also with sparse attention open and closed.

    tokens: size of a batch. distractors: other keys, at most one every 32 tokens.
    """

    lengths: list[PositiveInt]
    documents: PositiveInt
    comparisons: PositiveInt
    tokens: PositiveInt
    distractors: PositiveInt


class PocketConfig(Strict):
    """The whole recipe. `model` holds keyword arguments of the family's config class in transformers.

    far: words at least between the last mention of an item and a training question on it.
    """

    seed: int
    model: dict[str, Any]
    far: PositiveInt
    vocabulary: VocabularyConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    stages: list[StageConfig]
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def layers_match(self) -> Self:
        """The layer list decides the depth; a second number would only contradict it."""
        if "num_hidden_layers" in self.model and "layer_types" in self.model:
            raise ValueError("model.num_hidden_layers follows from model.layer_types: leave it out")
        return self


def load_config(path: Path) -> PocketConfig:
    """Read and validate a recipe file."""
    return PocketConfig.model_validate(yaml.safe_load(path.read_text()))
