"""Everything `lookahead evaluate` measures, as the sections of results.json."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from data_gen.core.errors import InputError
from data_gen.traces.store import TraceStore
from data_gen.traces.types import DocumentMeta
from eval.offline.recall import BUDGETS, DocumentRecall, as_rows, in_pieces, measure, recall_rows, task_groups
from eval.offline.refresh import analyse_lookahead
from eval.offline.timeline import timeline
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import DocumentScorer
from indexer_train.measure.reliability import reliability
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Cut, Threshold

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DEPTH_BINS = [f"{low:.0%}-{high:.0%}" for low, high in pairwise(DEPTHS)]
LENGTHS = 4
"""Bins of document lengths, equally wide."""
SAMPLED = 1 << 16
"""Candidates of one document that its scores are judged by, at most."""
COMPARED = ("mass_recall", "golden_recall", "precision", "f1", "kept")


def evaluate(
    indexers: dict[str, MemoryIndexer],
    store: TraceStore,
    golden: float,
    budget: float,
    every_token: bool = False,
) -> dict[str, Any]:
    """Measure one indexer ("indexer"), or two side by side ("A", "B"), on held-out traces.

    Returns recall (rows as in RecallRow), by_length and by_depth (the same at `budget` and the threshold), lookahead,
    heat (needle depth x length), documents (what the threshold kept of each), reliability and timeline (of the first
    indexer alone), and comparison (None of one). Raises InputError on training traces and where no document has a
    window.
    """
    store.check_held_out()
    thresholds = {name: threshold_for(indexer, budget) for name, indexer in indexers.items()}
    budgets = sorted({*BUDGETS, budget})
    found = list(measure(indexers, store, golden, thresholds, every_token, budgets))
    if not found:
        raise InputError(f"{store.root}: no document with a whole lookahead window; nothing to evaluate on")
    first, *_ = indexers
    short = [each for each in found if each.cut in (budget, "threshold")]
    lengths, length_of = length_bins([each.meta.length for each in found])
    needles = [each for each in short if each.meta.depth is not None]
    cells = [each for each in needles if (each.policy, each.cut) == (first, budget)]
    return {
        "recall": as_rows(recall_rows(found, task_groups)),
        "by_length": as_rows(recall_rows(short, lambda meta: [length_of(meta)])),
        "by_depth": as_rows(recall_rows(needles, lambda meta: [depth_bin(meta)])),
        "heat": as_rows(recall_rows(cells, lambda meta: [f"{depth_bin(meta)} | {length_of(meta)}"])),
        "documents": _documents(found, first),
        "lookahead": analyse_lookahead(indexers, store, golden, budget),
        "reliability": sampled_reliability(indexers[first], store, golden),
        "timeline": timeline(indexers[first], store, golden, budget),
        "comparison": compare(found, *indexers) if len(indexers) == 2 else None,
        "evaluated": {"budget": budget, "golden": golden, "every_token": every_token,
                      "bins": [DEPTH_BINS, lengths], "notes": unseen_notes(indexers, store),
                      "thresholds": {name: str(threshold) for name, threshold in thresholds.items()}},
    }  # fmt: skip


def threshold_for(indexer: MemoryIndexer, budget: float) -> Threshold:
    """The indexer's threshold for `budget`, else the one it has for something else, else the paper's sigmoid 0.5."""
    calibrated = [each for each in indexer.spec.selections if isinstance(each, Threshold)]
    meant = [each for each in calibrated if (each.target, each.value) == ("budget", budget)]
    return [*meant, *calibrated, Threshold(cuts=[Cut(score=0.0)])][0]


def unseen_notes(indexers: dict[str, MemoryIndexer], store: TraceStore) -> list[str]:
    """A line for each indexer that may have been trained on these documents: neither side says which they are."""
    if "split" in store.manifest.documents:
        return []
    makers = {name: indexer.spec.provenance for name, indexer in indexers.items()}
    return [
        f"note: {store.root} says nothing of how its documents were split (imported dumps do not), nor do those that "
        f"{name} was trained on: recall on training documents means nothing"
        for name, made in makers.items()
        if made is not None and any("split" not in source.documents for source in made.sources)
    ]


def sampled_reliability(indexer: MemoryIndexer, store: TraceStore, golden: float) -> list[dict[str, float]]:
    """`reliability` of the candidates of all serving windows; of a long document every n-th, SAMPLED at most."""
    scores, truth = [], []
    for document in store:
        windows = document.windows(serving=True)
        scorer, seen = DocumentScorer(indexer, document), 0
        bounds = [document.trace.chunking.candidates(int(p)) for p in document.positions[windows[:, 0]]]
        every = max(1, -(-sum(last - first for first, last in bounds) // SAMPLED))
        for served in in_pieces(document, windows):
            candidate = served.labels.candidate
            place = slice(-seen % every, None, every)
            scores.append(scorer.joined_scores(served)[candidate][place])
            truth.append(served.labels.golden(golden)[candidate][place])
            seen += int(candidate.sum())
    return [asdict(each) for each in reliability(torch.cat(scores), torch.cat(truth))]


def length_bins(lengths: list[int]) -> tuple[list[str], Callable[[DocumentMeta], str]]:
    """Up to LENGTHS equally wide bins over all of `lengths`: their names, and which one a document is in."""
    edges = np.unique(np.linspace(min(lengths), max(lengths), LENGTHS + 1).round().astype(int))
    names = [f"{low:,}-{high:,}" for low, high in pairwise(edges)] or [f"{edges[0]:,}"]

    def name(meta: DocumentMeta) -> str:
        return names[min(int(np.searchsorted(edges, meta.length, side="right")), len(names)) - 1]

    return names, name


def depth_bin(meta: DocumentMeta) -> str:
    """The fifth of the document that its needle lies in."""
    return DEPTH_BINS[min(int(np.searchsorted(DEPTHS, meta.depth, side="right")), len(DEPTH_BINS)) - 1]


def _documents(found: list[DocumentRecall], policy: str) -> list[dict[str, Any]]:
    """What the calibrated threshold did to each document."""
    return [
        {"name": each.meta.name, "task": each.meta.task, "length": each.meta.length, "depth": each.meta.depth}
        | {name: None if np.isnan(value) else value for name, value in each.macro.items()}
        for each in found
        if (each.policy, each.cut) == (policy, "threshold")
    ]


def compare(found: list[DocumentRecall], one: str, other: str) -> list[dict[str, Any]]:
    """Two indexers on the same documents: {task, budget, metric, each one's macro average by its name, difference,
    low, high, documents}; the 95 % interval is the bootstrap of the per-document differences."""
    values: dict[tuple, dict[str, dict[str, float]]] = {}
    for each in found:
        if each.policy in (one, other):
            for group in task_groups(each.meta):
                values.setdefault((group, each.cut), {}).setdefault(each.meta.name, {})[each.policy] = each.macro
    rows = []
    for (group, cut), documents in values.items():
        for metric in COMPARED:
            pairs = np.array([[pair[one][metric], pair[other][metric]] for pair in documents.values()])
            pairs = pairs[~np.isnan(pairs).any(axis=1)]
            if len(pairs):
                difference, low, high = (float(x[0]) for x in bootstrap_means(pairs[:, :1] - pairs[:, 1:]))
                means = dict(zip((one, other), pairs.mean(axis=0).tolist(), strict=True))
                interval = {"low": None, "high": None} if np.isnan(low) else {"low": low, "high": high}
                row = {"task": group, "budget": cut, "metric": metric} | means | {"difference": difference}
                rows.append(row | interval | {"documents": len(pairs)})
    return rows
