"""Validated settings of the indexer and of its training."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from data_gen.core.config import Count, NoneOrMore, Strict, Width

LARGEST = 1 << 24
"""Heads times rank: 256 times the paper's."""


class IndexerConfig(Strict):
    """Shape of the memory indexer, the same for each of its layers.

    heads (H), rank (r): of the query encoder; distance_bumps: bumps on log2 distance, 0 for none; scale: predict a
    factor of the logits from the query; slot: predict the logit of "protected", which the score is relative to; bias:
    learn one constant added to every logit of every layer (a serving engine takes it as its logit offset).
    join: how the layers' logits become one score per chunk.
    """

    heads: Width
    rank: Width
    distance_bumps: int = Field(12, ge=0, le=1 << 16)
    scale: bool = True
    slot: bool = True
    bias: bool = False
    join: Literal["sum", "mean", "max"] = "sum"

    @model_validator(mode="after")
    def _fits_somewhere(self) -> Self:
        if self.heads * self.rank > LARGEST:
            raise ValueError(f"heads times rank is {self.heads * self.rank}, more than {LARGEST}")
        return self


class CandidatesConfig(Strict):
    """Which chunks the loss compares for each query token.

    kind: `all` that are visible and unprotected, or `sampled`: golden ones and drawn negatives;
    negatives: for each positive (a token without any draws as many as with one); positives: at most that many;
    source: where negatives come from first: `uniform` over the visible chunks, `in_batch` (golden for other tokens of
    the batch), `hard` (what `lookahead mine` found); uniform ones fill up what the source lacks;
    common_weight: weight of golden chunks that are golden for more than 80 % of the document's tokens.
    """

    kind: Literal["all", "sampled"] = "all"
    negatives: Count = 3
    positives: Count = 512
    source: Literal["uniform", "in_batch", "hard"] = "uniform"
    common_weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _only_when_sampled(self) -> Self:
        fields = type(self).model_fields
        for name in ("negatives", "positives", "source"):
            if self.kind == "all" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: only with `kind: sampled`")
        return self


class TrainConfig(Strict):
    """How the indexer is trained.

    one_by_one: train each layer in a run of its own, with its own best checkpoint, in the memory of one, instead of all
    together;
    loss: a name of indexer_train/losses; loss_options: what that class lets a recipe set;
    candidates: which chunks it compares;
    epochs: passes over the documents; windows_per_document: query tokens of a document in one epoch, which is one
    batch; stride: every n-th token only; tails: train on windows cut short by the end of an answer too (those the
    traces admit, `trace.tail`);
    accumulation: batches whose gradients make one step (of each process); precision: of the matrix products, scoring
    included, in training (weights, optimizer and every evaluation stay in float32);
    learning_rate: its height after the warm-up, from where it falls to zero along a cosine; warmup: share of all steps
    (or their number, from 1 on) in which it rises; weight_decay: of AdamW; clip: longest gradient, 0 for any;
    golden: head-maximum probability (oracle `attention`) or layers (oracle `indexer`) that make a chunk golden;
    validation_every: every n-th document is held back from training to select the checkpoint; choose: by what: the
    highest `mass_recall` when `budget` of the chunks are kept, or the lowest `peak_entropy` (measure/metrics.py), which
    goes with what the model still says, as mass recall does not; select: how chunks are chosen, then and when served:
    the best of each window (`budget`), or all that reach one `threshold`;
    workers: processes that make batches while the device computes; without a number two beside a GPU that shares enough
    memory with them (indexer_train/processes.py), and none elsewhere; no result depends on it;
    report_to: trackers that get every measurement, by the stock trainer's names (`wandb`, `tensorboard`, ...), whose
    packages must be installed; no result depends on them;
    eval_epochs: epochs between two such checks, which are checkpoints too; patience: checks without a better one before
    training stops; the best one is kept;
    seed: of the first weights, the order of documents and the negatives;
    init: where to take the first weights from instead of drawing them: a folder with a safetensors checkpoint of the
    DeepSeek-V4 backbone (only its indexers are read), or with the release's layer_NN.safetensors files.
    """

    one_by_one: bool = False
    loss: str = "listwise_mass"
    loss_options: dict[str, float | bool] = Field(default_factory=dict)
    candidates: CandidatesConfig = CandidatesConfig()
    epochs: Count
    windows_per_document: Count = 64
    stride: Count = 1
    tails: bool = True
    accumulation: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup: NonNegativeFloat = 0.05
    clip: NonNegativeFloat = 1.0
    golden: PositiveFloat = 0.05
    budget: float = Field(0.1, gt=0, le=1)
    select: Literal["budget", "threshold"] = "budget"
    validation_every: Count = 6
    choose: Literal["mass_recall", "peak_entropy"] = "mass_recall"
    eval_epochs: Count = 2
    patience: Count = 5
    workers: NoneOrMore | None = None
    report_to: list[str] = Field(default_factory=list)
    seed: int = Field(0, ge=0, lt=1 << 32)
    init: str | None = None
