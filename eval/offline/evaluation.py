"""Everything `lookahead evaluate` measures, as the sections of results.json (eval/report/rows.py)."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from data_gen.core.errors import InputError
from data_gen.traces.store import TraceStore
from data_gen.traces.types import DocumentMeta
from eval.offline.recall import (
    BUDGETS,
    THRESHOLD,
    Amount,
    DocumentRecall,
    in_pieces,
    measure,
    ratios,
    recall_rows,
    task_groups,
)
from eval.offline.refresh import analyse_lookahead, timeline
from eval.report.rows import (
    CellRecall,
    ComparisonRow,
    DepthRecall,
    DocumentRow,
    Evaluated,
    LengthRecall,
    ReliabilityRow,
)
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import DocumentScorer
from indexer_train.measure.reliability import reliability
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Cut, Threshold

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DEPTH_BINS = {f"{low:.0%}-{high:.0%}": (low, high) for low, high in pairwise(DEPTHS)}
"""Fifths of a document by name: their ends."""
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

    Returns the sections of results.json from `recall` to `evaluated`, as models. Recall is at BUDGETS, `budget` and the
    thresholds, by length and depth at the last two only; documents, reliability and timeline are of the first indexer;
    comparison is None of one. Raises InputError on training traces and where no document has a window.
    """
    store.check_held_out()
    chosen = {name: threshold_for(name, indexer, budget) for name, indexer in indexers.items()}
    thresholds = {name: threshold for name, (threshold, _) in chosen.items()}
    budgets = sorted({*BUDGETS, budget})
    found = list(measure(indexers, store, golden, thresholds, every_token, budgets))
    if not found:
        raise InputError(f"{store.root}: no document with a whole lookahead window; nothing to evaluate on")
    first, *_ = indexers
    short = [each for each in found if each.amount in (Amount(budget), THRESHOLD)]
    lengths, length_of = length_bins([each.meta.length for each in found])
    needles = [each for each in short if each.meta.depth is not None]
    cells = [each for each in needles if (each.ranker.policy, each.amount) == (first, Amount(budget))]
    places = {f"{depth} | {length}": (depth, length) for depth in DEPTH_BINS for length in lengths}
    by_length = recall_rows(short, lambda meta: [length_of(meta)])
    by_depth = recall_rows(needles, lambda meta: [depth_bin(meta)])
    heat = recall_rows(cells, lambda meta: [f"{depth_bin(meta)} | {length_of(meta)}"])
    return {
        "recall": recall_rows(found, task_groups),
        "by_length": [LengthRecall(**dict(row), length=lengths[row.task]) for row in by_length],
        "by_depth": [DepthRecall(**dict(row), depth=DEPTH_BINS[row.task]) for row in by_depth],
        "heat": [
            CellRecall(**dict(row), depth=DEPTH_BINS[depth], length=lengths[length])
            for row in heat
            for depth, length in [places[row.task]]
        ],
        "documents": _documents(found, first),
        "lookahead": analyse_lookahead(indexers, store, golden, budget),
        "reliability": sampled_reliability(indexers[first], store, golden),
        "timeline": timeline(indexers[first], store, golden, budget),
        "comparison": compare(found) if len(indexers) == 2 else None,
        "evaluated": Evaluated(
            budget=budget,
            golden=golden,
            every_token=every_token,
            bins=(list(DEPTH_BINS), list(lengths)),
            notes=[*unseen_notes(indexers, store), *(note for _, note in chosen.values() if note is not None)],
            thresholds={name: str(threshold) for name, threshold in thresholds.items()},
        ),
    }


def threshold_for(name: str, indexer: MemoryIndexer, budget: float) -> tuple[Threshold, str | None]:
    """The indexer's threshold for `budget`; else what it has instead, or a sigmoid of 0.5, and a line that says so."""
    calibrated = [each for each in indexer.spec.selections if isinstance(each, Threshold)]
    for each in calibrated:
        if (each.target, each.value) == ("budget", budget):
            return each, None
    used = calibrated[0] if calibrated else Threshold(cuts=[Cut(score=0.0)])
    what = str(used) if calibrated else f"{used}, which is a sigmoid of 0.5"
    return used, f"note: {name} has no threshold calibrated to keep {budget:.1%}; its threshold rows use {what}"


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


def sampled_reliability(indexer: MemoryIndexer, store: TraceStore, golden: float) -> list[ReliabilityRow]:
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
    return [ReliabilityRow(**asdict(each)) for each in reliability(torch.cat(scores), torch.cat(truth))]


def length_bins(lengths: list[int]) -> tuple[dict[str, tuple[int, int]], Callable[[DocumentMeta], str]]:
    """Up to LENGTHS equally wide bins over all of `lengths`: their ends by name, and which one a document is in."""
    edges = np.unique(np.linspace(min(lengths), max(lengths), LENGTHS + 1).round().astype(int)).tolist()
    bins = {f"{low:,}-{high:,}": (low, high) for low, high in pairwise(edges)}
    bins = bins or {f"{edges[0]:,}": (edges[0], edges[0])}
    names = list(bins)

    def name(meta: DocumentMeta) -> str:
        return names[min(int(np.searchsorted(edges, meta.length, side="right")), len(names)) - 1]

    return bins, name


def depth_bin(meta: DocumentMeta) -> str:
    """The fifth of the document that its needle lies in; of documents with one."""
    assert meta.depth is not None
    return list(DEPTH_BINS)[min(int(np.searchsorted(DEPTHS, meta.depth, side="right")), len(DEPTH_BINS)) - 1]


def _documents(found: list[DocumentRecall], policy: str) -> list[DocumentRow]:
    """What the calibrated threshold did to each document."""
    return [
        DocumentRow(
            name=each.meta.name,
            task=each.meta.task,
            length=each.meta.length,
            depth=each.meta.depth,
            **ratios(each.macro),
        )
        for each in found
        if (each.ranker.policy, each.amount) == (policy, THRESHOLD)
    ]


def compare(found: list[DocumentRecall]) -> list[ComparisonRow]:
    """Indexers "A" and "B" on the same documents, by the bootstrap of the per-document differences."""
    values: dict[tuple[str, Amount], dict[str, dict[str, dict[str, float]]]] = {}
    for each in found:
        if each.ranker.policy in ("A", "B"):
            for group in task_groups(each.meta):
                of_document = values.setdefault((group, each.amount), {}).setdefault(each.meta.name, {})
                of_document[each.ranker.policy] = each.macro
    rows = []
    for (group, amount), documents in values.items():
        for metric in COMPARED:
            pairs = np.array([[pair["A"][metric], pair["B"][metric]] for pair in documents.values()])
            pairs = pairs[~np.isnan(pairs).any(axis=1)]
            if len(pairs):
                difference, low, high = (float(x[0]) for x in bootstrap_means(pairs[:, :1] - pairs[:, 1:]))
                one, other = pairs.mean(axis=0).tolist()
                rows.append(
                    ComparisonRow(
                        task=group,
                        **amount._asdict(),
                        metric=metric,
                        A=one,
                        B=other,
                        difference=difference,
                        low=None if np.isnan(low) else low,
                        high=None if np.isnan(low) else high,
                        documents=len(pairs),
                    )
                )
    return rows
