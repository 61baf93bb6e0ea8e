"""Recall of golden chunks and of attention mass on held-out traces: every chunk scored, every policy, every budget."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import DocumentMeta
from eval.offline.policies import golden_oracle, policies
from indexer_train.cpu import return_freed_memory
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import RATIOS, DocumentScorer, ServedWindows, Tally, ranked_tally, tally
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import join_layers
from indexer_train.selection import Cut, Threshold

BUDGETS = (0.02, 0.05, 0.1, 0.135, 0.2)
TOP = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of chunks K at which recall@K is measured, where some document of the store has more."""
PIECE_ELEMENTS = 1 << 21
"""Windows x chunks measured at once: what evaluation holds does not grow with the number of windows."""
LONG = 1 << 16
"""Chunks of a document from which on memory is worth more than the 2 % of the time that giving it back takes."""
PLAIN_TASKS = ("text", "document", "chat")
Asked = float | str
"""A share of the chunks, "threshold", or "top K"."""


@dataclass(frozen=True)
class DocumentRecall:
    """One document under one policy at one cut. macro: means over its windows; sums: its windows added up."""

    meta: DocumentMeta
    policy: str
    cut: Asked
    macro: dict[str, float]
    sums: Tally


@dataclass(frozen=True)
class RecallRow:
    """One cell of the evaluation.

    context: longest document of the cell in tokens; budget: share of chunks asked for, "threshold" or "top K".
    golden_recall, mass_recall, precision, f1, kept, resident_mass: see measure/metrics.py; *macro* averages, that
    is means over documents of means over a document's windows; None where no window has anything to divide by.
    micro: the same with all windows added up; interval: 95 % bootstrap interval over documents of each macro average.
    """

    policy: str
    task: str
    context: int
    budget: Asked
    golden_recall: float | None
    mass_recall: float | None
    precision: float | None
    f1: float | None
    kept: float
    resident_mass: float
    micro: dict[str, float | None]
    interval: dict[str, list[float] | None]
    documents: int
    windows: int


def evaluate_recall(
    indexer: MemoryIndexer, store: TraceStore, golden: float, threshold: float, every_token: bool = False
) -> list[RecallRow]:
    """Score all chunks of every held-out document with every policy: a row per policy, group of tasks and cut.

    golden: head-maximum probability (or votes) that makes a chunk golden; threshold: calibrated score of the indexer;
    every_token: a window from every traced token instead of one per refresh.
    Rows for each task and for all needle tasks together ("needles"); the indexer's layers on their own are "layer L",
    at the threshold too: the one of the joined score, as no layer has one of its own.
    """
    given = Threshold(cuts=[Cut(score=threshold)])
    found = measure({"indexer": indexer}, store, golden, {"indexer": given}, every_token)
    return recall_rows(list(found), task_groups)


def measure(
    indexers: dict[str, MemoryIndexer],
    store: TraceStore,
    golden: float,
    thresholds: dict[str, Threshold],
    every_token: bool = False,
    budgets: Sequence[float] = BUDGETS,
    baselines: bool = True,
) -> Iterator[DocumentRecall]:
    """Every document of `store` under every indexer (by name), its layers and, if asked, what needs no training.

    Documents without a window, or that need nothing in any, are left out.
    """
    longest = max(document.chunks for document in store)
    if longest > LONG:
        return_freed_memory()
    cuts = [*budgets, *(f"top {count}" for count in TOP if count < longest)]
    for document in store:
        windows = document.windows(serving=not every_token)
        scorers = {name: DocumentScorer(indexer, document) for name, indexer in indexers.items()}
        untrained = policies(document, golden) if baselines else {}
        pieces: dict[tuple[str, Asked], list[Tally]] = defaultdict(list)
        for served in in_pieces(document, windows):
            counts = _counts(served, cuts)
            for name, scorer in scorers.items():
                layers = scorer.layer_logits(served)
                joined = join_layers(layers, scorer.indexer.spec.shape.join)
                alone = zip(scorer.indexer.spec.layers, layers, strict=True) if len(layers) > 1 else ()
                scored = {name: joined} | {f"{_prefix(name)}layer {layer}": scores for layer, scores in alone}
                for policy, scores in scored.items():
                    reached = thresholds[name].choose(
                        scores, served.labels.candidate, served.positions, served.chunking
                    )
                    pieces[policy, "threshold"].append(tally(reached, served.labels, golden, served.visible))
                    _add(pieces, policy, cuts, ranked_tally(scores, served.labels, golden, served.visible, counts))
            for policy, score in untrained.items():
                asked = torch.zeros_like(counts) if policy == "protected" else counts
                found = ranked_tally(score(served), served.labels, golden, served.visible, asked)
                if policy == "oracle":  # each metric has a bound of its own
                    best = ranked_tally(golden_oracle(served), served.labels, golden, served.visible, asked)
                    found = replace(found, hits=best.hits)
                _add(pieces, policy, cuts, found)
        for (policy, cut), parts in pieces.items():
            whole = Tally.concatenate(parts)
            if whole.needed.any():
                macro = {name: float(value.nanmean()) for name, value in whole.ratios().items()}
                yield DocumentRecall(document.meta, policy, cut, macro, whole.total())


def task_groups(meta: DocumentMeta) -> list[str]:
    """The groups a document counts in: its task, and all needle tasks together."""
    return [meta.task] if meta.task in PLAIN_TASKS else [meta.task, "needles"]


def recall_rows(found: list[DocumentRecall], groups: Callable[[DocumentMeta], list[str]]) -> list[RecallRow]:
    """Average documents group by group (`groups` says which ones a document counts in)."""
    cells: dict[tuple[str, str, Asked], list[DocumentRecall]] = defaultdict(list)
    for each in found:
        for group in groups(each.meta):
            cells[each.policy, group, each.cut].append(each)
    return [_row(policy, group, cut, members) for (policy, group, cut), members in cells.items()]


def _row(policy: str, group: str, cut: Asked, members: list[DocumentRecall]) -> RecallRow:
    mean, low, high = bootstrap_means(np.array([[each.macro[name] for name in RATIOS] for each in members]))
    sums = Tally.concatenate([each.sums for each in members]).total()
    return RecallRow(
        policy=policy,
        task=group,
        context=max(each.meta.length for each in members),
        budget=cut,
        **{name: _number(value) for name, value in zip(RATIOS, mean, strict=True)},
        micro={name: _number(value) for name, value in sums.ratios().items()},
        interval={
            name: None if np.isnan(a) else [float(a), float(b)] for name, a, b in zip(RATIOS, low, high, strict=True)
        },
        documents=len(members),
        windows=int(sums.windows),
    )


def _number(value: float | torch.Tensor) -> float | None:
    return None if np.isnan(float(value)) else float(value)


def as_rows(rows: list[RecallRow]) -> list[dict]:
    """The rows as results.json holds them."""
    return [asdict(row) for row in rows]


def _prefix(name: str) -> str:
    return "" if name == "indexer" else f"{name} "


def _counts(served: ServedWindows, cuts: list[Asked]) -> torch.Tensor:
    """[W, cuts] chunks that each cut buys."""
    bought = [served.kept(cut) if isinstance(cut, float) else int(cut.split()[1]) for cut in cuts]
    one = torch.ones(len(served.windows), dtype=torch.int64)
    return torch.stack([count * one for count in bought], dim=1)


def in_pieces(document: TraceDocument, windows: torch.Tensor) -> Iterator[ServedWindows]:
    """`windows` ([W, 2]) a few at a time, in order."""
    for piece in windows.split(max(1, PIECE_ELEMENTS // max(1, document.chunks))):
        if len(piece):
            yield ServedWindows.of(document, piece)


def _add(pieces: dict[tuple[str, Asked], list[Tally]], policy: str, cuts: list[Asked], found: Tally) -> None:
    for place, cut in enumerate(cuts):
        pieces[policy, cut].append(Tally(**{name: value[:, place] for name, value in vars(found).items()}))
