"""What benchmarks/ablations.py trains: a recipe with one thing changed at a time, all on the same traces, and recipes
whose labels or keys need traces of their own."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from benchmarks.ablation_tables import DIAGNOSES, RECIPE
from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from data_gen.text.needles import NEEDLE_TASKS
from data_gen.traces.store import TraceStore
from indexer_train.config import CandidatesConfig, TrainConfig
from indexer_train.data.mixture import mix
from indexer_train.load import load_indexer
from indexer_train.losses import LOSSES
from indexer_train.measure.calibration import mean_peak_entropy, measure, score_windows
from indexer_train.measure.metrics import served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget
from indexer_train.training.trainer import prepare, stock_trainer, train
from recipes import Recipe, load_recipe


@dataclass(frozen=True)
class Other:
    """Another recipe, trained on traces of its own: what its labels, states or documents are is its `trace` section's
    and its `documents` section's to say."""

    recipe: Recipe
    traces: list[Path]

    @classmethod
    def of(cls, text: str) -> tuple[str, "Other"]:
        """(name, recipe and traces) of NAME=RECIPE:TRACES, several traces with commas. Raises InputError."""
        name, _, rest = text.partition("=")
        recipe, _, traces = rest.partition(":")
        if not (recipe and traces and name.replace("-", "").replace("_", "").isalnum()):
            raise InputError(f"--variant {text}: give NAME=RECIPE:TRACES, the name of letters, digits and hyphens")
        if name in VARIATIONS:
            raise InputError(f"--variant {text}: {name} is a variation of every recipe; choose another name")
        return name, cls(load_recipe(recipe), [Path(path) for path in traces.split(",")])


@dataclass(frozen=True)
class Variation:
    """What is changed. indexer, train: settings of the recipe's sections; window: tokens that labels look ahead, and
    between refreshes; layer: place of the only one of the traced layers that is read."""

    indexer: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    layer: int | None = None


EPOCH = "epoch-"
"""Before an epoch's number, the name of the indexer that it ended with."""
Batches = Literal["host", "device"]
"""Where training makes its batches."""
VARIATIONS: dict[str, Variation] = {
    RECIPE: Variation(),
    "no-bumps": Variation({"distance_bumps": 0}),
    "twelve-bumps": Variation({"distance_bumps": 12}),
    "twice-as-large": Variation({"heads": 32, "rank": 256}),
    "no-slot": Variation({"slot": False}),
    "no-scale": Variation({"scale": False}),
    "bias": Variation({"bias": True}),
    "joined-by-max": Variation({"join": "max"}),
    "middle-layer": Variation(layer=1),
    "last-layer": Variation(layer=-1),
    "horizon-16": Variation(window=16),
    "chosen-by-mass": Variation(train={"choose": "mass_recall"}),
    "one-by-one": Variation(train={"one_by_one": True}),
    "no-tails": Variation(train={"tails": False}),
    "golden-0.02": Variation(train={"golden": 0.02}),
    "golden-0.1": Variation(train={"golden": 0.1}),
    "golden-0.2": Variation(train={"golden": 0.2}),
    "sampled": Variation(train={"candidates": CandidatesConfig(kind="sampled")}),
    "in-batch": Variation(train={"candidates": CandidatesConfig(kind="sampled", source="in_batch")}),
    **{loss: Variation(train={"loss": loss, "loss_options": {}}) for loss in LOSSES},
    "balanced-focal": Variation(train={"loss": "focal", "loss_options": {"alpha": 0.25}}),
    "smoothed-bce": Variation(train={"loss": "bce", "loss_options": {"smoothing": 0.1}}),
}
"""A loss that the recipe has anyway is left out. An option of a loss comes with that loss."""


def learn(
    recipe: Recipe,
    traces: list[Path],
    names: list[str],
    out: Path,
    others: dict[str, Other] | None = None,
    batches: Batches | None = None,
    measured: Path | None = None,
) -> None:
    """Train what is not trained yet, and measure it on the traces `measured`, or on what is held back from training.

    others: recipes with traces of their own, by name; where what they hold back would be measured, nothing is said of
    them: those are other documents. batches: where they are made, instead of where the recipe says. Bytes of the same
    traces are read once.
    """
    store, checked = mix(traces), False
    apart = None if measured is None else TraceStore.open(measured)
    if apart is not None:
        apart.check_held_out()
        check_comparable("--diagnose", apart, store)
        apart.check_settings(store.manifest.trace)
    on = "held back" if measured is None else str(measured)
    for name in names:
        variation, diagnosis = VARIATIONS.get(name, Variation()), out / name / "diagnosis.json"
        if diagnosis.exists():
            known = json.loads(diagnosis.read_text()).get("diagnosed_on", on)
            if known != on:
                raise InputError(f"{diagnosis}: says something of {known!r}, not of {on!r}: not to be compared")
            continue
        other = (others or {}).get(name)
        base, own = (recipe, store) if other is None else (other.recipe, mix(other.traces))
        if own is not store:
            check_comparable(name, own, store)
        trace = own.manifest.trace
        layers = trace.layers if variation.layer is None else [trace.layers[variation.layer]]
        trace = trace.model_copy(update={"window": variation.window or trace.window, "layers": layers})
        view = with_trace(own, trace)
        config = base.train.model_copy(update=variation.train | ({"batches": batches} if batches else {}))
        if own is store:
            config = config.model_copy(update={"check_bytes": config.check_bytes and not checked})
            checked = True
        indexer = train(view, base.indexer.model_copy(update=variation.indexer), config, out / name)
        said: dict[str, Any] = {}  # of other windows or documents nothing is said that could be compared
        if variation.window is None and (other is None or (apart is not None and trace == apart.manifest.trace)):
            held = view.hold_back(config.validation_every)[1] if apart is None else with_trace(apart, trace)
            said = diagnosed(indexer, held, recipe.train) | {"diagnosed_on": on}
        write_atomically(diagnosis, lambda file, said=said: file.write_text(json.dumps(said)))


class KeepEvery(TrainerCallback):
    """Keeps a copy of every checkpoint as an indexer, which the trainer would remove, named by its epoch."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The one that is saved just now."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        shutil.copytree(checkpoint, self.out / f"{EPOCH}{round(state.epoch)}" / "indexer")


def learn_epochs(recipe: Recipe, traces: list[Path], out: Path, batches: Batches | None, measured: Path | None) -> None:
    """Train the recipe once and keep the indexer of each epoch, OUT/epoch-N, with what is said of it as in `learn`.

    OUT/recipe is the one that the recipe's criterion chooses; it is an epoch's and has no diagnosis of its own. A run
    that was stopped begins again. Raises InputError where OUT holds variations, and for layers trained one by one.
    """
    if recipe.train.one_by_one:
        raise InputError("train.one_by_one: each layer has epochs of its own; compare those of a recipe without it")
    training, chosen = out / "training", out / RECIPE / "indexer"
    if (out / RECIPE).exists() and not training.exists():
        raise InputError(f"{out}: holds variations; give the epochs a folder of their own")
    store = mix(traces)
    config = recipe.train.model_copy(
        update={"eval_epochs": 1, "patience": recipe.train.epochs} | ({"batches": batches} if batches else {})
    )
    held = store.hold_back(config.validation_every)[1] if measured is None else TraceStore.open(measured)
    if measured is not None:
        held.check_held_out()
        held.check_settings(store.manifest.trace)
    if not chosen.exists():
        for begun in (training, *out.glob(f"{EPOCH}*")):
            shutil.rmtree(begun, ignore_errors=True)
        trainer = stock_trainer(prepare(store, recipe.indexer, config, training), config, training)
        trainer.add_callback(KeepEvery(out))
        trainer.train()
        chosen.parent.mkdir(exist_ok=True)
        shutil.copytree(str(trainer.state.best_model_checkpoint), training / "chosen", dirs_exist_ok=True)
        (training / "chosen").rename(chosen)
    for epoch in out.glob(f"{EPOCH}*"):
        said = diagnosed(load_indexer(epoch / "indexer"), held, config)
        write_atomically(epoch / "diagnosis.json", lambda file, said=said: file.write_text(json.dumps(said)))


def with_trace(store: TraceStore, trace: TraceConfig) -> TraceStore:
    """A view of a store as if it had been traced so: fewer layers, another window."""
    return TraceStore(store.root, store.manifest.model_copy(update={"trace": trace}), store.files)


def diagnosed(indexer: MemoryIndexer, store: TraceStore, config: TrainConfig) -> dict[str, float]:
    """DIAGNOSES of an indexer, on documents that it was not trained on; without texts or questions not theirs.

    config: whose `golden` and `budget` count, the same for all that are compared, whatever they were trained with.
    """
    scored = score_windows(indexer, served_windows(store))
    kinds = {
        "": scored,
        "_of_texts": [each for each in scored if each.served.document.meta.task == "text"],
        "_of_questions": [each for each in scored if each.served.document.meta.task in NEEDLE_TASKS],
    }
    found: dict[str, float] = {}
    for kind, members in kinds.items():
        if members:
            values = next(
                row.values
                for row in measure(members, [Budget(budget=config.budget)], config.golden, "validation")
                if row.task == "all"
            )
            values = values | {"peak_entropy": mean_peak_entropy(members)}
            found |= {f"{name}{kind}": value for name, value in values.items() if f"{name}{kind}" in DIAGNOSES}
    return found


def check_comparable(name: str, own: TraceStore, store: TraceStore) -> None:
    """Raise InputError unless indexers of both traces can be asked in one run: one backbone, the same chunks."""
    for what, one, two in (
        ("backbone", own.manifest.backbone.fingerprint, store.manifest.backbone.fingerprint),
        ("chunking", own.manifest.trace.chunking, store.manifest.trace.chunking),
    ):
        if one != two:
            raise InputError(f"{name}: the {what} of {own.root} differs from that of {store.root}: not to be compared")
