"""Everything `lookahead evaluate` measures, as the sections of results.json."""

from typing import Any

import numpy as np
import torch

from data_gen.errors import InputError
from data_gen.store import DocumentMeta, TraceStore
from eval.lookahead import analyse_lookahead
from eval.recall import BUDGETS, DocumentRecall, as_rows, measure, recall_rows, task_groups
from eval.timeline import timeline
from indexer_train.intervals import bootstrap_means
from indexer_train.metrics import indexer_scores, served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Cut, Threshold

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LENGTHS = 4
"""Bins of document lengths, equally wide."""
RELIABILITY_BINS = 20
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

    Returns recall (rows as in RecallRow), by_length and by_depth (the same at `budget` and the threshold), heat (needle
    depth x length), documents (what the threshold kept of each), reliability, lookahead and timeline (of the first
    indexer), and comparison (None of one). Raises InputError on training traces and where no document has a window.
    """
    if store.manifest.documents.get("split") == "train":
        raise InputError(f"{store.root}: training documents; recall is measured on held-out ones")
    thresholds = {name: threshold_for(indexer, budget) for name, indexer in indexers.items()}
    budgets = sorted({*BUDGETS, budget})
    found = list(measure(indexers, store, golden, thresholds, every_token, budgets))
    if not found:
        raise InputError(f"{store.root}: no document with a whole lookahead window; nothing to evaluate on")
    first, *_ = indexers
    short = [each for each in found if each.cut in (budget, "threshold")]
    length_of = length_bins([each.meta.length for each in found])
    needles = [each for each in short if each.meta.depth is not None]
    cells = [each for each in needles if (each.policy, each.cut) == (first, budget)]
    return {
        "recall": as_rows(recall_rows(found, task_groups)),
        "by_length": as_rows(recall_rows(short, lambda meta: [length_of(meta)])),
        "by_depth": as_rows(recall_rows(needles, lambda meta: [depth_bin(meta)])),
        "heat": as_rows(recall_rows(cells, lambda meta: [f"{depth_bin(meta)} | {length_of(meta)}"])),
        "documents": _documents(found, first),
        "lookahead": analyse_lookahead(indexers[first], store, golden, budget),
        "reliability": reliability(indexers[first], store, golden),
        "timeline": timeline(indexers[first], store, golden, budget),
        "comparison": compare(found, *indexers) if len(indexers) == 2 else None,
        "evaluated": {"budget": budget, "golden": golden, "every_token": every_token,
                      "thresholds": {name: str(threshold) for name, threshold in thresholds.items()}},
    }  # fmt: skip


def threshold_for(indexer: MemoryIndexer, budget: float) -> Threshold:
    """The indexer's threshold for `budget`, else the one it has for something else, else the paper's sigmoid 0.5."""
    calibrated = [each for each in indexer.spec.selections if isinstance(each, Threshold)]
    meant = [each for each in calibrated if (each.target, each.value) == ("budget", budget)]
    return [*meant, *calibrated, Threshold(cuts=[Cut(score=0.0)])][0]


def reliability(indexer: MemoryIndexer, store: TraceStore, golden: float) -> list[dict[str, float]]:
    """Candidates of all serving windows in bins of equal counts, the lowest scores first.

    Of a long document every n-th candidate, SAMPLED at most. Per bin {predicted: mean sigmoid(score), observed: share
    that is golden, chunks}.
    """
    scores, truth = [], []
    for served in served_windows(store):
        candidate = served.labels.candidate
        every = -(-int(candidate.sum()) // SAMPLED)
        scores.append(indexer_scores(indexer, served)[candidate][::every])
        truth.append(served.labels.golden(golden)[candidate][::every])
    ranked, order = torch.cat(scores).double().sigmoid().sort()
    parts = zip(ranked.chunk(RELIABILITY_BINS), torch.cat(truth)[order].double().chunk(RELIABILITY_BINS), strict=True)
    return [{"predicted": float(p.mean()), "observed": float(t.mean()), "chunks": len(p)} for p, t in parts]


def length_bins(lengths: list[int]) -> Any:
    """A function from a document to the name of its bin: up to LENGTHS equally wide ones over all of `lengths`."""
    edges = np.unique(np.linspace(min(lengths), max(lengths), LENGTHS + 1).round().astype(int))

    def name(meta: DocumentMeta) -> str:
        if len(edges) == 1:
            return f"{edges[0]:,}"
        place = min(int(np.searchsorted(edges, meta.length, side="right")) - 1, len(edges) - 2)
        return f"{edges[place]:,}-{edges[place + 1]:,}"

    return name


def depth_bin(meta: DocumentMeta) -> str:
    """The fifth of the document that its needle lies in."""
    place = min(int(np.searchsorted(DEPTHS, meta.depth, side="right")) - 1, len(DEPTHS) - 2)
    return f"{DEPTHS[place]:.0%}-{DEPTHS[place + 1]:.0%}"


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
