"""Which of an indexer's layers to serve, and how to join them: every subset scored on held-out traces."""

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

from data_gen.core.errors import InputError
from data_gen.traces.store import TraceStore
from indexer_train.config import Criterion, TrainConfig
from indexer_train.formats.convert import keep_layers
from indexer_train.measure.calibration import ScoredWindows, mean_peak_entropy, task_mean
from indexer_train.measure.metrics import DocumentScorer, mass_recall, served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import join_layers
from indexer_train.selection import Budget
from indexer_train.spec import Metric

Join = Literal["sum", "mean", "max"]
EXHAUSTIVE = 8
"""Up to this many layers every subset is tried; beyond, layers are added greedily."""


@dataclass(frozen=True)
class LayerChoice:
    """One candidate to serve, measured on held-out documents: means over a task's documents, then over tasks.

    mass_recall: when a budget of the chunks is kept; peak_entropy: nats, of the whole ranking.
    """

    layers: list[int]
    join: Join
    mass_recall: float
    peak_entropy: float


def criterion(indexer: MemoryIndexer) -> Criterion:
    """What ranks the choices of layers: what its training chose the checkpoint by, else the default of training."""
    made = indexer.spec.provenance
    known = {} if made is None else made.train
    return known.get("choose", TrainConfig.model_fields["choose"].default)


def choose_layers(indexer: MemoryIndexer, store: TraceStore, count: int, budget: float) -> list[LayerChoice]:
    """All subsets of `count` layers under every joining rule, the best first by the indexer's `criterion`.

    Layers are scored once; with more than EXHAUSTIVE of them, each rule's set grows greedily by the layer that helps
    most. Raises InputError when the indexer has fewer layers, or the store no window or training documents.
    """
    store.check_held_out()
    layers = indexer.spec.layers
    if not 1 <= count <= len(layers):
        raise InputError(f"cannot choose {count} of the indexer's {len(layers)} layers {layers}")
    scored = [(each, DocumentScorer(indexer, each.document).layer_logits(each)) for each in served_windows(store)]
    if not scored:
        raise InputError(f"{store.root}: no document with a whole lookahead window to judge layers on")

    selection, by = Budget(budget=budget), criterion(indexer)

    def choice(subset: tuple[int, ...], join: Join) -> LayerChoice:
        joined = [ScoredWindows(served, join_layers(scores[list(subset)], join)) for served, scores in scored]
        values = [mass_recall(each.choose(selection), each.served.labels) for each in joined]
        kept = [layers[index] for index in subset]
        return LayerChoice(kept, join, task_mean(joined, values)[""], mean_peak_entropy(joined))

    def rank(option: LayerChoice) -> float:
        """Lower is better."""
        return -option.mass_recall if by == "mass_recall" else option.peak_entropy

    found = []
    for join in get_args(Join):
        if len(layers) <= EXHAUSTIVE:
            found += [choice(subset, join) for subset in itertools.combinations(range(len(layers)), count)]
            continue
        subset: tuple[int, ...] = ()
        for _ in range(count):
            rest = (index for index in range(len(layers)) if index not in subset)
            tried = [tuple(sorted((*subset, index))) for index in rest]
            subset = min(tried, key=lambda indices: rank(choice(indices, join)))
        found.append(choice(subset, join))
    return sorted(found, key=rank)


def served_as(indexer: MemoryIndexer, choice: LayerChoice, budget: float) -> MemoryIndexer:
    """The indexer as chosen. Thresholds and what was measured belong to a set of layers and a rule: they go."""
    served = keep_layers(indexer, choice.layers)
    spec, selection = served.spec, Budget(budget=budget)
    spec.shape = spec.shape.model_copy(update={"join": choice.join})
    spec.selections, spec.outputs = [selection], []
    if spec.provenance is not None:
        found = {"mass_recall": choice.mass_recall, "peak_entropy": choice.peak_entropy}
        metric = Metric(data="layer choice", task="all", selection=str(selection), values=found)
        spec.provenance = spec.provenance.model_copy(update={"metrics": [metric]})
    return served
