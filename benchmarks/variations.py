"""What benchmarks/ablations.py trains: a recipe with one thing changed at a time, all on the same traces."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ablation_tables import DIAGNOSES, RECIPE
from data_gen.core.files import write_atomically
from data_gen.traces.store import TraceStore
from indexer_train.config import CandidatesConfig
from indexer_train.data.mixture import mix
from indexer_train.losses import LOSSES
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train
from recipes import Recipe


@dataclass(frozen=True)
class Variation:
    """What is changed. indexer, train: settings of the recipe's sections; window: tokens that labels look ahead, and
    between refreshes; layer: place of the only one of the traced layers that is read."""

    indexer: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    layer: int | None = None


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
    "joined": Variation(train={"loss": "listwise_peak", "loss_options": {"joined": True}}),
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


def learn(recipe: Recipe, traces: list[Path], names: list[str], out: Path) -> None:
    """Train what is not trained yet, and measure it on the documents held back from training."""
    store = mix(traces)
    for name in names:
        variation, diagnosis = VARIATIONS[name], out / name / "diagnosis.json"
        if diagnosis.exists():
            continue
        trace = store.manifest.trace
        layers = trace.layers if variation.layer is None else [trace.layers[variation.layer]]
        trace = trace.model_copy(update={"window": variation.window or trace.window, "layers": layers})
        view = TraceStore(store.root, store.manifest.model_copy(update={"trace": trace}), store.files)
        config = recipe.train.model_copy(update=variation.train)
        indexer = train(view, recipe.indexer.model_copy(update=variation.indexer), config, out / name)
        said = {}  # of other windows nothing is said that could be compared
        if variation.window is None:
            _, validation = view.hold_back(config.validation_every)
            rows = [row for row in indexer.spec.provenance.metrics if row.task == "all"]
            values = rows[0].values | MassRecallEvaluator(validation, config.budget)(indexer)
            said = {each: values[each] for each in DIAGNOSES}
        write_atomically(diagnosis, lambda file, said=said: file.write_text(json.dumps(said)))
