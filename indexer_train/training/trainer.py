"""Training: the stock sentence-transformers trainer, wired to trace stores.

A run is: refuse what cannot go well, build the indexer's spec and the indexer, its loss and its batches, hand them to
the stock trainer, resume or begin, and save the best checkpoint with the way it is served.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from data_gen.core.cpu import keep_freed_memory
from data_gen.core.errors import InputError
from data_gen.core.files import seal_of, writing
from data_gen.traces.store import TraceStore
from data_gen.traces.validate import check_store
from indexer_train import processes
from indexer_train.config import IndexerConfig, TrainConfig
from indexer_train.data.batches import (
    AllCandidates,
    Collator,
    DocumentBatchSampler,
    SampledCandidates,
    TellEpoch,
    window_index,
)
from indexer_train.data.device import DeviceCollator
from indexer_train.data.mixture import sources
from indexer_train.data.sampling import any_golden
from indexer_train.formats.native import initialise
from indexer_train.load import load_indexer, spec_for
from indexer_train.losses import LOSSES, IndexerLoss
from indexer_train.measure.calibration import calibrate, measure, score_windows
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, served_first
from indexer_train.spec import IndexerSpec, Provenance
from indexer_train.training import tracking
from indexer_train.training.arguments import training_arguments
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.resume import (
    KeepLoss,
    check_best,
    newest_whole,
    over,
    restore_loss,
    same_settings,
    stay_with_best,
)

WITHOUT_EFFECT = {"workers", "report_to", "check_bytes"}
"""Settings of training that change no result: a run may continue with others."""

logger = logging.getLogger(__name__)


def train(
    store: TraceStore,
    shape: IndexerConfig,
    config: TrainConfig,
    out: Path,
    weights: dict[Path, float] | None = None,
) -> MemoryIndexer:
    """Train an indexer on `store`, keep the checkpoint with the best recall on its held-back documents.

    The indexer is saved to `out`/indexer. Checkpoints lie under `out`/checkpoints; a run that was stopped continues
    from the newest one. weights: how often an epoch reads the documents of each mixed store, by its folder. Raises
    InputError before training when a trace is damaged, when there are too few or none has anything golden for a loss
    that needs it, and when another number of processes trained so far; in training when it diverges.
    """
    if config.one_by_one and len(store.manifest.trace.layers) > 1:
        return _train_one_by_one(store, shape, config, out, weights)
    run = prepare(store, shape, config, out, weights)
    trainer = stock_trainer(run, config, out)
    if (out / "indexer").exists():
        logger.info("%s is trained already", out / "indexer")
        return load_indexer(out / "indexer")
    checkpoint = newest_whole(out / "checkpoints")
    if checkpoint is not None:
        state = stay_with_best(checkpoint)
        trainer.accelerator.wait_for_everyone()
        if over(state):
            best = load_indexer(Path(state.best_model_checkpoint or checkpoint))
            run.indexer.load_state_dict(best.state_dict())
            return _finish(run.indexer, run.evaluator, config, out)
        restore_loss(run.loss, checkpoint)
    tracking.begin(config.report_to, out, run.settings)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.best_model_checkpoint is not None:  # the stock trainer takes the last where it cannot read
        check_best(Path(trainer.state.best_model_checkpoint))
    return _finish(run.indexer, run.evaluator, config, out)


def _finish(indexer: MemoryIndexer, evaluator: MassRecallEvaluator, config: TrainConfig, out: Path) -> MemoryIndexer:
    """Choose how the indexer is served, measure it and save it."""
    scored = score_windows(indexer, evaluator.served)
    others = [Budget(budget=config.budget), calibrate(scored, "budget", config.budget)]
    indexer.spec.selections = served_first(evaluator.selection(scored), others)
    if indexer.spec.provenance is not None:
        indexer.spec.provenance.metrics = measure(scored, indexer.spec.selections, config.golden, "validation")
    if processes.rank() == 0:
        indexer.save_whole(out / "indexer")
    return indexer


def _train_one_by_one(
    store: TraceStore, shape: IndexerConfig, config: TrainConfig, out: Path, weights: dict[Path, float] | None
) -> MemoryIndexer:
    """A run for each layer under `out`/layer-N, put together in `out`/indexer: layers share no parameters."""
    if shape.bias:
        raise InputError("train.one_by_one: `bias` concerns all layers together; leave it out")
    if processes.rank() == 0:
        same_settings(out, _settings(store, shape, config, weights, None))
    traces, validation = store.hold_back(config.validation_every)
    indexer = MemoryIndexer.from_spec(_spec(traces, len(validation.paths()), shape, config, weights))
    for layer in store.manifest.trace.layers:
        trace = store.manifest.trace.model_copy(update={"layers": [layer]})
        one = TraceStore(store.root, store.manifest.model_copy(update={"trace": trace}), store.files)
        alone = config.model_copy(update={"one_by_one": False})
        part = train(one, shape, alone, out / f"layer-{layer}", weights)
        own = part.query_encoder.encoders[str(layer)].state_dict()
        indexer.query_encoder.encoders[str(layer)].load_state_dict(own)
    if (out / "indexer").exists():
        return load_indexer(out / "indexer")
    return _finish(indexer, MassRecallEvaluator(validation, config.budget, config.select), config, out)


class IndexerTrainer(SentenceTransformerTrainer):
    """The stock trainer, which says in one line that the disk is full."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)


@dataclass(frozen=True)
class Run:
    """What one run trains, on what, and who judges it.

    index: a row for each training window (`window_index`); steps: of one epoch; settings: all that the run is made of,
    as `out`/training.json keeps it.
    """

    indexer: MemoryIndexer
    loss: IndexerLoss
    index: Dataset
    collator: Collator
    evaluator: MassRecallEvaluator
    steps: int
    settings: dict[str, Any]


def stock_trainer(run: Run, config: TrainConfig, out: Path) -> IndexerTrainer:
    """The stock sentence-transformers trainer for `run`, with what it lacks as callbacks."""
    callbacks: list[TrainerCallback] = [
        EarlyStoppingCallback(config.patience),
        TellEpoch(run.collator),
        KeepLoss(run.loss),
    ]
    collate: Any = run.collator  # the stock trainer's own kind of collator makes tokens of texts
    return IndexerTrainer(
        model=run.indexer,
        args=training_arguments(config, out, run.steps),
        train_dataset=run.index,
        loss=run.loss,
        evaluator=run.evaluator,
        data_collator=collate,
        callbacks=callbacks,
    )


def prepare(
    store: TraceStore, shape: IndexerConfig, config: TrainConfig, out: Path, weights: dict[Path, float] | None = None
) -> Run:
    """Refuse what cannot go well, then make what a run needs; the first process writes `out`/training.json.

    Raises InputError as `train` does before training.
    """
    keep_freed_memory()
    _check(store, config)
    traces, validation = store.hold_back(config.validation_every)
    index = window_index(traces, config.stride, config.tails, weights)
    _check_windows(traces, validation, index, config)
    set_seed(config.seed)
    indexer = MemoryIndexer.from_spec(_spec(traces, len(validation.paths()), shape, config, weights))
    if config.init is not None:
        initialise(indexer, Path(config.init))
    loss = _loss(indexer, config)
    collator, mined = _collator(traces, config, indexer.device)
    settings = _settings(store, shape, config, weights, mined)
    if processes.rank() == 0:
        same_settings(out, settings)
    steps = _steps(store, index, config)
    evaluator = MassRecallEvaluator(validation, config.budget, config.select)
    return Run(indexer, loss, index, collator, evaluator, steps, settings)


def _check(store: TraceStore, config: TrainConfig) -> None:
    """Raise InputError for settings that do not fit the traces, or damage in this process's share of them."""
    if config.loss not in LOSSES:
        raise InputError(f"train.loss: unknown loss {config.loss!r}; choose from {', '.join(LOSSES)}")
    oracle = store.manifest.trace.oracle
    highest = 1 if oracle == "attention" else len(store.manifest.backbone.full_layers)
    if config.golden > highest:
        raise InputError(f"train.golden {config.golden:g}: the oracle `{oracle}` gives {highest} at most")
    if config.candidates.common_weight != 1 and not LOSSES[config.loss].pointwise:
        raise InputError(f"train.candidates.common_weight: {config.loss} weighs no single chunk; leave it out")
    tracking.check_trackers(config.report_to)
    if config.check_bytes:
        check_store(store.only(store.paths()[processes.rank() :: processes.count()]))


def _check_windows(traces: TraceStore, validation: TraceStore, index: Dataset, config: TrainConfig) -> None:
    """Raise InputError where there is nothing to learn from, or nothing to judge it by."""
    if not len(index) or not any(len(document.windows(serving=False)) for document in validation):
        raise InputError(f"{traces.root}: too few documents with a whole lookahead window to train and validate on")
    if not LOSSES[config.loss].graded and not any_golden(traces, index, config.golden):
        raise InputError(
            f"{traces.root}: no training window has a golden chunk (at least {config.golden:g}), so {config.loss} "
            "would learn nothing; lower train.golden"
        )


def _spec(
    traces: TraceStore, validation: int, shape: IndexerConfig, config: TrainConfig, weights: dict[Path, float] | None
) -> IndexerSpec:
    """Of an indexer trained on `traces` and chosen on `validation` other documents."""
    trace, backbone = traces.manifest.trace, traces.manifest.backbone
    made = Provenance(
        backbone=backbone.model_type,
        model=backbone.name,
        oracle=trace.oracle,
        sources=sources(traces, weights),
        validation=validation,
        train=config.model_dump(exclude=WITHOUT_EFFECT),
    )
    return spec_for(traces.manifest, shape, made)


def _loss(indexer: MemoryIndexer, config: TrainConfig) -> IndexerLoss:
    """The recipe's loss. What it learns itself is averaged over processes, as the stock wrapper does for the model."""
    loss = LOSSES[config.loss](indexer, config.golden, **config.loss_options)
    loss.scoring = getattr(torch, config.precision)
    for parameter in loss.own_parameters().values():
        parameter.register_hook(processes.average)
    return loss


def _collator(traces: TraceStore, config: TrainConfig, device: torch.device) -> tuple[Collator, list[str] | None]:
    """What makes batches of `traces`, and what its hard negatives were mined by (None without any)."""
    layers = traces.manifest.trace.layers
    if config.batches == "device":
        return DeviceCollator(traces, layers, config.golden, config.candidates, config.seed, device), None
    if config.candidates.kind == "all":
        return AllCandidates(traces, layers, config.golden, config.candidates), None
    collator = SampledCandidates(traces, layers, config.golden, config.candidates, config.seed)
    return collator, collator.hard.made_by if collator.hard else None


def _settings(
    store: TraceStore,
    shape: IndexerConfig,
    config: TrainConfig,
    weights: dict[Path, float] | None,
    mined: list[str] | None,
) -> dict[str, Any]:
    """All that a run is made of; what the backbone is called changes nothing."""
    traces = store.manifest.model_dump(exclude={"backbone": {"name"}})
    traces["files"] = [f"{path.name} {seal_of(path)}" for path in store.paths()]
    settings = {"indexer": shape.model_dump(), "train": config.model_dump(exclude=WITHOUT_EFFECT), "traces": traces}
    more = {"weights": [*(weights or {}).values()], "hard_negatives": mined}
    return settings | {name: value for name, value in more.items() if value}


def _steps(store: TraceStore, index: Dataset, config: TrainConfig) -> int:
    """Optimizer steps of one epoch. Raises InputError where a process would have no batch, or warming up no end."""
    batches = len(DocumentBatchSampler(index, config.windows_per_document))
    if not batches:
        raise InputError(f"{store.root}: fewer documents to train on than the {processes.count()} processes")
    steps = -(-batches // (processes.count() * config.accumulation))
    if config.warmup >= max(1, config.epochs * steps):
        raise InputError(f"train.warmup {config.warmup:g}: the whole run is only {config.epochs * steps} steps long")
    return steps
