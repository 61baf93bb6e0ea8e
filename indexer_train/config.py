"""Validated settings of the indexer and of its training."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from data_gen.core.config import Count, NoneOrMore, Strict, Width

Rule = Literal["budget", "threshold", "coverage"]
"""Ways to choose chunks by their scores (indexer_train/selection.py)."""
Criterion = Literal["mass_recall", "peak_entropy"]
"""What the best checkpoint is known by."""
LARGEST = 1 << 24
"""Heads times rank: 256 times the paper's."""


class IndexerConfig(Strict):
    """Shape of the memory indexer, the same for each of its layers.

    heads: heads of the query encoder (H); rank: width of a query before it is split into heads (r);
    distance_bumps: how many bumps over the log2 of the distance a logit may have, 0 for none;
    scale: predict a factor of the logits from the query; slot: predict the logit of "protected", which the score is
    relative to; bias: learn one constant added to every logit of every layer (a serving engine takes it as its logit
    offset).
    join: how the layers' logits become one score per chunk.
    """

    heads: Width
    rank: Width
    distance_bumps: int = Field(default=12, ge=0, le=1 << 16)
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

    kind: `all` chunks that are visible and unprotected, or `sampled`: golden ones and drawn negatives;
    negatives: how many negatives are drawn for each positive (a token without any draws as many as with one);
    positives: the most golden chunks that are taken of one query token;
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
    loss: name of the loss, one of indexer_train/losses (`listwise_mass` finds more attention than the default, and its
    output is worse); loss_options: settings of that loss, as its class lists them;
    candidates: which chunks the loss compares;
    epochs: passes over the documents; windows_per_document: query tokens of a document in one epoch, which is one
    batch; stride: train on every n-th query token only; tails: train on windows cut short by the end of an answer too
    (those the traces admit, `trace.tail`);
    accumulation: batches whose gradients make one step (of each process); precision: type of the matrix products in
    training, scoring included (weights, optimizer and every evaluation stay in float32);
    learning_rate: learning rate after the warm-up, from where it falls to zero along a cosine; warmup: share of all
    steps (or their number, from 1 on) in which the learning rate rises; weight_decay: weight decay of AdamW;
    clip: longest gradient, to which longer ones are shortened; 0 leaves all as they are;
    golden: the least that makes a chunk golden: a head-maximum probability (oracle `attention`) or a number of layers
    (oracle `indexer`);
    validation_every: every n-th document is held back from training to select the checkpoint; choose: which checkpoint
    is selected: the one with the lowest `peak_entropy` (measure/metrics.py), or with the highest `mass_recall` when
    `budget` of the chunks are kept; among the epochs of one training the former's ranks had the sign of answers and
    text on both models that were asked, the latter's on one, and neither says much of text (docs/measurements.md);
    budget: share of the chunks that are kept when checkpoints are compared, and when the indexer is served, unless a
    calibration says otherwise; select: how chunks are chosen, when checkpoints are compared and when the indexer is
    served: the best of each window (`budget`), all that reach one `threshold`, or the fewest that reach one predicted
    share of the attention (`coverage`);
    batches: where batches are made: on the `host`, or on the `device` that trains, from documents that stay in its
    memory: faster on a GPU, with other negatives of the same distribution (any source but `hard`);
    workers: processes that make batches while the device computes; without a number two beside a GPU that shares enough
    memory with them (indexer_train/processes.py), and none elsewhere; no result depends on it;
    report_to: trackers that get every measurement, by the stock trainer's names (`wandb`, `tensorboard`, ...), whose
    packages must be installed; no result depends on them;
    check_bytes: read every byte of the traces before training; else only what a step reads is looked at, which suits
    stores that `lookahead inspect`, by shards if they are large, has read;
    eval_epochs: epochs between two checkpoints, each of which is measured on the documents that were held back;
    patience: checkpoints without a better one before training stops; the best one is kept;
    seed: seed of the first weights, the order of documents and the negatives;
    init: where to take the first weights from instead of drawing them: a folder with a safetensors checkpoint of a
    DeepSeek-V4, or of a model with DSA (only its indexers are read), or with the release's layer_NN.safetensors files.
    """

    one_by_one: bool = False
    loss: str = "listwise_peak"
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
    budget: float = Field(default=0.1, gt=0, le=1)
    select: Rule = "budget"
    validation_every: Count = 6
    choose: Criterion = "peak_entropy"
    batches: Literal["host", "device"] = "host"
    eval_epochs: Count = 2
    patience: Count = 5
    workers: NoneOrMore | None = None
    report_to: list[str] = Field(default_factory=list)
    check_bytes: bool = True
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    init: str | None = None

    @model_validator(mode="after")
    def _batches_can_be_made_there(self) -> Self:
        if self.batches == "device" and self.candidates.source == "hard":
            raise ValueError("batches: hard negatives are drawn on the host; leave `device` out")
        if self.batches == "device" and self.workers:
            raise ValueError("workers: only with `batches: host`; the device needs none")
        return self
