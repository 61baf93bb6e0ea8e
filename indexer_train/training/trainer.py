"""Training: the stock sentence-transformers trainer, wired to trace stores."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import EarlyStoppingCallback, set_seed

from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from data_gen.traces.store import TraceStore
from data_gen.traces.validate import check_store
from indexer_train.card import Provenance
from indexer_train.config import IndexerConfig, TrainConfig
from indexer_train.cpu import keep_freed_memory
from indexer_train.data.batches import AllCandidates, DocumentBatchSampler, SampledCandidates, TellEpoch, window_index
from indexer_train.data.mixture import sources
from indexer_train.data.sampling import any_golden
from indexer_train.formats.native import initialise
from indexer_train.load import load_indexer
from indexer_train.losses import LOSSES
from indexer_train.measure.calibration import calibrate, measure, score_windows
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Budget, served_first
from indexer_train.training import processes, tracking
from indexer_train.training.checkpoints import KeepLoss, newest_whole, over, restore_loss, stay_with_best
from indexer_train.training.evaluator import MassRecallEvaluator

SETTINGS = "training.json"

logger = logging.getLogger(__name__)


def train(
    store: TraceStore,
    shape: IndexerConfig,
    config: TrainConfig,
    out: Path,
    weights: dict[Path, float] | None = None,
) -> MemoryIndexer:
    """Train an indexer on `store`, keep the checkpoint with the best recall on its held-back documents.

    The indexer is saved to `out`/indexer.

    Checkpoints lie under `out`/checkpoints; a run that was stopped continues from the newest one. weights: how often
    an epoch reads the documents of each mixed store, by its folder. Raises InputError before training when a trace is
    damaged, when there are too few or none has anything golden for a loss that needs it, and when another number of
    processes trained so far; in training when it diverges.
    """
    if config.one_by_one and len(store.manifest.trace.layers) > 1:
        return _train_one_by_one(store, shape, config, out, weights)
    trainer = make_trainer(store, shape, config, out, weights)
    if (out / "indexer").exists():
        logger.info("%s is trained already", out / "indexer")
        return load_indexer(out / "indexer")
    checkpoint = newest_whole(out / "checkpoints")
    if checkpoint is not None:
        state = stay_with_best(checkpoint)
        trainer.accelerator.wait_for_everyone()
        if over(state):
            best = load_indexer(Path(state.best_model_checkpoint or checkpoint))
            trainer.model.load_state_dict(best.state_dict())
            return _finish(trainer.model, trainer.evaluator, config, out)
        restore_loss(trainer.loss, checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _finish(trainer.model, trainer.evaluator, config, out)


def _finish(indexer: MemoryIndexer, evaluator: MassRecallEvaluator, config: TrainConfig, out: Path) -> MemoryIndexer:
    """Choose how the indexer is served, measure it and save it."""
    scored = score_windows(indexer, evaluator.served)
    others = [Budget(budget=config.budget), calibrate(scored, "budget", config.budget)]
    indexer.spec.selections = served_first(evaluator.selection(scored), others)
    indexer.spec.provenance.metrics = measure(scored, indexer.spec.selections, config.golden, "validation")
    if processes.rank() == 0:
        indexer.save_whole(out / "indexer")
    return indexer


def _train_one_by_one(
    store: TraceStore, shape: IndexerConfig, config: TrainConfig, out: Path, weights: dict[Path, float] | None
) -> MemoryIndexer:
    """A run for each layer under `out`/layer-N, put together in `out`/indexer: layers share no parameters."""
    if shape.bias or config.loss_options.get("joined"):
        raise InputError("train.one_by_one: `bias` and a `joined` loss are of all layers together; leave them out")
    if processes.rank() == 0:
        _same_settings(out, _settings(store, shape, config, {"weights": [*(weights or {}).values()]}))
    traces, validation = store.hold_back(config.validation_every)
    indexer = MemoryIndexer.from_spec(_spec(traces, len(validation.paths()), shape, config, weights))
    for layer in store.manifest.trace.layers:
        trace = store.manifest.trace.model_copy(update={"layers": [layer]})
        one = TraceStore(store.root, store.manifest.model_copy(update={"trace": trace}), store.paths())
        alone = config.model_copy(update={"one_by_one": False})
        part = train(one, shape, alone, out / f"layer-{layer}", weights)
        own = part.query_encoder.encoders[str(layer)].state_dict()
        indexer.query_encoder.encoders[str(layer)].load_state_dict(own)
    if (out / "indexer").exists():
        return load_indexer(out / "indexer")
    return _finish(indexer, MassRecallEvaluator(validation, config.budget, config.select), config, out)


def make_trainer(
    store: TraceStore,
    shape: IndexerConfig,
    config: TrainConfig,
    out: Path,
    weights: dict[Path, float] | None = None,
) -> SentenceTransformerTrainer:
    """The stock trainer as `train` runs it, with a new indexer."""
    keep_freed_memory()
    if config.loss not in LOSSES:
        raise InputError(f"train.loss: unknown loss {config.loss!r}; choose from {', '.join(LOSSES)}")
    oracle = store.manifest.trace.oracle
    highest = 1 if oracle == "attention" else len(store.manifest.backbone.full_layers)
    if config.golden > highest:
        raise InputError(f"train.golden {config.golden:g}: the oracle `{oracle}` says {highest} at most")
    if config.candidates.common_weight != 1 and not LOSSES[config.loss].pointwise:
        raise InputError(f"train.candidates.common_weight: {config.loss} weighs no single chunk; leave it out")
    own = store.paths()[processes.rank() :: processes.count()]
    check_store(TraceStore(store.root, store.manifest, own))
    traces, validation = store.hold_back(config.validation_every)
    index = window_index(traces, config.stride, config.tails, weights)
    if not len(index) or not len(window_index(validation)):
        raise InputError(f"{store.root}: too few documents with a whole lookahead window to train and validate on")
    if not LOSSES[config.loss].graded and not any_golden(traces, index, config.golden):
        raise InputError(
            f"{store.root}: no training window has a golden chunk (at least {config.golden:g}), so that {config.loss} "
            "would learn nothing; lower train.golden"
        )
    set_seed(config.seed)
    indexer = MemoryIndexer.from_spec(_spec(traces, len(validation.paths()), shape, config, weights))
    if config.init is not None:
        initialise(indexer, Path(config.init))
    loss = LOSSES[config.loss](indexer, config.golden, **config.loss_options)
    loss.scoring = getattr(torch, config.precision)
    for parameter in loss.own_parameters().values():
        parameter.register_hook(processes.average)
    settings = (traces, traces.manifest.trace.layers, config.golden, config.candidates)
    sampled = config.candidates.kind == "sampled"
    collator = SampledCandidates(*settings, config.seed) if sampled else AllCandidates(*settings)
    mined = collator.hard.made_by if sampled and collator.hard else None
    run = _settings(store, shape, config, {"weights": [*(weights or {}).values()], "hard_negatives": mined})
    if processes.rank() == 0:
        _same_settings(out, run)
    batches = len(DocumentBatchSampler(index, config.windows_per_document))
    if not batches:
        raise InputError(f"{store.root}: fewer documents to train on than the {processes.count()} processes")
    steps = -(-batches // (processes.count() * config.accumulation))
    if config.warmup >= max(1, config.epochs * steps):
        raise InputError(f"train.warmup {config.warmup:g}: the whole run is only {config.epochs * steps} steps long")
    every = config.eval_epochs * steps
    cuda = torch.cuda.is_available()
    workers = processes.workers(config.workers, cuda)
    return SentenceTransformerTrainer(
        model=indexer,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(out / "checkpoints"),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.windows_per_document,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            gradient_accumulation_steps=config.accumulation,
            max_grad_norm=config.clip,
            bf16=config.precision == "bfloat16",
            use_cpu=not cuda,
            ddp_find_unused_parameters=False,
            batch_sampler=DocumentBatchSampler,
            router_mapping={"query": "query", "document": "document"},
            eval_strategy="steps",
            eval_steps=every,
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_mass_recall",
            greater_is_better=True,
            logging_steps=every,
            logging_nan_inf_filter=False,  # it would wait for the GPU in every step
            restore_callback_states_from_checkpoint=True,
            dataloader_pin_memory=cuda,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            accelerator_config={"non_blocking": cuda},
            report_to=tracking.report_to(out),
            remove_unused_columns=False,
            seed=config.seed,
        ),
        train_dataset=index,
        loss=loss,
        evaluator=MassRecallEvaluator(validation, config.budget, config.select),
        data_collator=collator,
        callbacks=[
            EarlyStoppingCallback(config.patience),
            TellEpoch(collator),
            KeepLoss(loss),
            tracking.RecipeToWandb(run),
        ],
    )


def _spec(
    traces: TraceStore, validation: int, shape: IndexerConfig, config: TrainConfig, weights: dict[Path, float] | None
) -> IndexerSpec:
    """Of an indexer trained on `traces` and chosen on `validation` other documents."""
    trace, backbone = traces.manifest.trace, traces.manifest.backbone
    return IndexerSpec(
        shape=shape,
        layers=trace.layers,
        hidden=backbone.hidden,
        key_width=backbone.key_width,
        chunking=trace.chunking,
        window=trace.window,
        backbone=backbone.fingerprint,
        key=backbone.key,
        rope=backbone.rope,
        provenance=Provenance(
            backbone=backbone.model_type,
            model=backbone.name,
            oracle=trace.oracle,
            sources=sources(traces, weights),
            validation=validation,
            train=config.model_dump(exclude={"workers"}),
        ),
    )



def _settings(store: TraceStore, shape: IndexerConfig, config: TrainConfig, more: dict[str, Any]) -> dict[str, Any]:
    """All that a run is made of; what the backbone is called changes nothing."""
    traces = store.manifest.model_dump(exclude={"backbone": {"name"}})
    traces["files"] = [f"{document.path.name} {document.checksum}" for document in store]
    settings = {"indexer": shape.model_dump(), "train": config.model_dump(exclude={"workers"}), "traces": traces}
    return settings | {name: value for name, value in more.items() if value}


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Remember what a run is made of; a run in the same folder with anything else is refused, not mixed in.

    A run that never reached a checkpoint left nothing to mix with: its settings may be corrected.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=1)
    path = out / SETTINGS
    begun = (out / "checkpoints").exists() or (out / "indexer").exists()
    if begun and path.exists() and path.read_bytes() != text.encode():
        raise InputError(f"{out}: holds a training run with other settings or traces; choose another folder")
    write_atomically(path, lambda file: file.write_text(text))
