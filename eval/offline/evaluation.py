"""Everything `lookahead evaluate` measures, as the sections of results.json (eval/report/rows.py)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from data_gen.core.cpu import return_freed_memory
from data_gen.core.errors import InputError
from data_gen.core.shard import Shard
from data_gen.core.tell import Progress
from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import DocumentMeta
from eval.offline.parts import Part, load_part, part_of, save_part
from eval.offline.recall import (
    BUDGETS,
    COVERAGE,
    THRESHOLD,
    Amount,
    DocumentRecall,
    Group,
    amounts_of,
    by_task,
    in_pieces,
    measure_document,
    ratios,
    recall_rows,
    task_groups,
)
from eval.offline.refresh import lookahead_rows, lookahead_sums, timeline
from eval.report.rows import (
    CellRecall,
    ComparisonRow,
    DepthRecall,
    DocumentRow,
    Evaluated,
    LengthRecall,
    RecallRow,
    ReliabilityRow,
)
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import DocumentScorer
from indexer_train.measure.reliability import reliability
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Coverage, Cut, Selection, Threshold

Calibrated = TypeVar("Calibrated", Threshold, Coverage)
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DEPTH_BINS = {f"{low:.0%}-{high:.0%}": (low, high) for low, high in pairwise(DEPTHS)}
"""Fifths of a document by name: their ends."""
LENGTHS = 4
"""Bins of document lengths, equally wide."""
SAMPLED = 1 << 16
"""Candidates of one document that its scores are judged by, at most."""
LONG = 1 << 16
"""Chunks of a document from which on memory is worth more than the time that giving it back takes."""
COMPARED = ("mass_recall", "golden_recall", "precision", "f1", "kept")


class Evaluation:
    """One indexer ("indexer"), or two side by side ("A", "B"), on held-out traces, a document at a time.

    golden: head-maximum probability (or votes) that makes a chunk golden; every_token: a window from every traced
    token instead of one per refresh. Recall is at BUDGETS, `budget` and the calibrated rules. Raises InputError on
    training traces.
    """

    def __init__(
        self, indexers: dict[str, MemoryIndexer], store: TraceStore, golden: float, budget: float, every_token: bool
    ) -> None:
        store.check_held_out()
        self.indexers, self.store, self.golden, self.budget = indexers, store, golden, budget
        self.every_token = every_token
        self.rules: dict[str, list[Threshold | Coverage]] = {}
        self.notes: list[str] = []
        for name, indexer in indexers.items():
            threshold, note = threshold_for(name, indexer, budget)
            self.rules[name] = [threshold, *calibrated_for(indexer, Coverage, budget)[:1]]
            self.notes += [] if note is None else [note]
        if max(document.chunks for document in store) > LONG:
            return_freed_memory()
        self.amounts = amounts_of(store, sorted({*BUDGETS, budget}))

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits for all that a part depends on."""
        asked: list[Any] = [self.golden, self.budget, self.every_token, self.amounts, list(self.store.files.values())]
        by = {
            name: (indexer.digest(), *(rule.model_dump_json() for rule in self.rules[name]))
            for name, indexer in self.indexers.items()
        }
        return hashlib.sha256(json.dumps([asked, by]).encode()).hexdigest()[:16]

    def part(self, document: TraceDocument) -> Part:
        """Measure one document."""
        first, *_ = self.indexers.values()
        recall = measure_document(self.indexers, document, self.golden, self.rules, self.every_token, self.amounts)
        sums = lookahead_sums(self.indexers, document, self.golden, self.budget)
        return Part(document.meta, list(recall), sums, *sample_candidates(first, document, self.golden))

    def measure_shard(self, folder: Path, shard: Shard, progress: Progress) -> int:
        """Write the shard's parts into `folder`, of one worker alone what several left over; how many are missing."""
        for path in progress(self.store.shard(shard).paths(), "evaluating"):
            if not (part := part_of(folder, path)).exists():
                save_part(self.part(self.store.document(path)), part)
        return sum(not (part_of(folder, path)).exists() for path in self.store.files)

    def parts(self, folder: Path) -> list[Part]:
        """Of all documents, in order. Raises InputError when one is damaged."""
        return [load_part(part_of(folder, path)) for path in self.store.files]

    def merged(self, parts: list[Part]) -> dict[str, Any]:
        """The sections of results.json from `recall` to `evaluated`, as models, of all documents in order.

        By length and depth at `budget` and the calibrated rules only; documents, reliability and timeline are of the
        first indexer; comparison is None of one. Raises InputError where no document has a window.
        """
        found = [each for part in parts for each in part.recall]
        if not found:
            raise InputError(f"{self.store.root}: no document with a whole lookahead window; nothing to evaluate on")
        first, *_ = self.indexers
        short = [each for each in found if each.amount in (Amount(self.budget), THRESHOLD, COVERAGE)]
        lengths, length_of = length_bins([each.meta.length for each in found])
        needles = [each for each in short if each.meta.depth is not None]
        cells = [each for each in needles if (each.ranker.policy, each.amount) == (first, Amount(self.budget))]

        def by_length(meta: DocumentMeta) -> list[Group]:
            name = length_of(meta)
            return [Group(name, length=lengths[name])]

        def by_depth(meta: DocumentMeta) -> list[Group]:
            name = depth_bin(meta)
            return [Group(name, depth=DEPTH_BINS[name])]

        def by_both(meta: DocumentMeta) -> list[Group]:
            (depth,), (length,) = by_depth(meta), by_length(meta)
            return [Group(f"{depth.task} | {length.task}", length.length, depth.depth)]

        scores, truth = (torch.cat([getattr(part, name) for part in parts]) for name in ("scores", "truth"))
        return {
            "recall": recall_rows(found, RecallRow, by_task),
            "by_length": recall_rows(short, LengthRecall, by_length),
            "by_depth": recall_rows(needles, DepthRecall, by_depth),
            "heat": recall_rows(cells, CellRecall, by_both),
            "documents": _documents(found, first),
            "lookahead": lookahead_rows([(part.meta, part.sums) for part in parts], self.store.manifest),
            "reliability": [ReliabilityRow(**asdict(each)) for each in reliability(scores, truth)],
            "timeline": timeline(self.indexers[first], self.store, self.golden, self.budget),
            "comparison": compare(found) if len(self.indexers) == 2 else None,
            "evaluated": Evaluated(
                budget=self.budget,
                golden=self.golden,
                every_token=self.every_token,
                bins=(list(DEPTH_BINS), list(lengths)),
                notes=[*unseen_notes(self.indexers, self.store), *self.notes],
                thresholds=self._told(Threshold),
                coverages=self._told(Coverage),
            ),
        }

    def _told(self, kind: type[Selection]) -> dict[str, str]:
        """The rules of a kind, in words, of the indexers that have one."""
        return {name: str(rule) for name, rules in self.rules.items() for rule in rules if isinstance(rule, kind)}


def evaluate(
    indexers: dict[str, MemoryIndexer], store: TraceStore, golden: float, budget: float, every_token: bool = False
) -> dict[str, Any]:
    """All documents of `store` in one process, see `Evaluation`."""
    evaluation = Evaluation(indexers, store, golden, budget, every_token)
    return evaluation.merged([evaluation.part(document) for document in store])


def threshold_for(name: str, indexer: MemoryIndexer, budget: float) -> tuple[Threshold, str | None]:
    """The indexer's threshold for `budget`; else what it has instead, or a sigmoid of 0.5, and a line that says so."""
    calibrated = calibrated_for(indexer, Threshold, budget)
    used = calibrated[0] if calibrated else Threshold(cuts=[Cut(score=0.0)])
    if (used.target, used.value) == ("budget", budget):
        return used, None
    what = str(used) if calibrated else f"{used}, which is a sigmoid of 0.5"
    return used, f"note: {name} has no threshold calibrated to keep {budget:.1%}; its threshold rows use {what}"


def calibrated_for(indexer: MemoryIndexer, kind: type[Calibrated], budget: float) -> list[Calibrated]:
    """The indexer's rules of a kind, those for `budget` first."""
    found = [each for each in indexer.spec.selections if isinstance(each, kind)]
    return sorted(found, key=lambda each: (each.target, each.value) != ("budget", budget))


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


def sample_candidates(
    indexer: MemoryIndexer, document: TraceDocument, golden: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [M] fp32, which are golden [M] bool) of one document's candidates in all serving windows, every n-th of a
    long one, SAMPLED at most."""
    scores, truth = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    windows = document.windows(serving=True)
    scorer, seen = DocumentScorer(indexer, document), 0
    bounds = [document.trace.chunking.candidates(int(p)) for p in document.positions[windows[:, 0]]]
    every = max(1, -(-sum(last - first for first, last in bounds) // SAMPLED))
    for served in in_pieces(document, windows, indexer.device):
        candidate = served.labels.candidate
        place = slice(-seen % every, None, every)
        scores.append(scorer.joined_scores(served)[candidate][place].cpu())
        truth.append(served.labels.golden(golden)[candidate][place].cpu())
        seen += int(candidate.sum())
    return torch.cat(scores), torch.cat(truth)


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
            both = [pair for pair in documents.values() if len(pair) == 2]  # one alone may have a coverage
            pairs = np.array([[pair["A"][metric], pair["B"][metric]] for pair in both]).reshape(-1, 2)
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
