"""Recall of golden chunks and of attention mass on held-out traces, at budgets and at the calibrated threshold."""

import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch

from data_gen.store import TraceStore
from eval.policies import golden_oracle, policies
from indexer_train.metrics import ServedWindows, golden_recall, mass_recall, served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import above, select

BUDGETS = (0.02, 0.05, 0.1, 0.135, 0.2)


@dataclass(frozen=True)
class RecallRow:
    """One cell of the evaluation: means over documents of means over a document's windows (macro).

    context: longest document of the cell in tokens; budget: share of chunks asked for, or "threshold"; kept: share of
    visible chunks really kept, protected ones apart; golden_recall: None where no window has a golden chunk.
    """

    policy: str
    task: str
    context: int
    budget: float | str
    golden_recall: float | None
    mass_recall: float
    kept: float
    documents: int
    windows: int


def evaluate_recall(indexer: MemoryIndexer, store: TraceStore, golden: float, threshold: float) -> list[RecallRow]:
    """Score all chunks of every held-out document with every policy.

    golden: head-maximum probability that makes a chunk golden; threshold: calibrated score of the indexer.
    Rows for each task and for all needle tasks together ("needles").
    """
    cells: dict[tuple, list[tuple]] = defaultdict(list)
    for served in served_windows(store):
        task = served.document.meta.task
        groups = [task] if task in ("text", "document", "chat") else [task, "needles"]
        for name, policy in policies(indexer, served.document).items():
            scores = policy(served)
            choices: dict[float | str, torch.Tensor] = {
                budget: select(scores, served.labels.candidate, served.kept(budget)) for budget in BUDGETS
            }
            if name == "indexer":
                choices["threshold"] = above(scores, served.labels.candidate, threshold)
            for budget, selected in choices.items():
                hits = selected
                if name == "oracle":  # each metric has a bound of its own
                    hits = select(golden_oracle(served), served.labels.candidate, served.kept(budget))
                for group in groups:
                    cells[name, group, budget].append(_document(selected, hits, served, golden))
    return [_row(*key, measured) for key, measured in cells.items()]


def _document(
    selected: torch.Tensor, hits: torch.Tensor, served: ServedWindows, golden: float
) -> tuple[float, float, float, int, int]:
    """(golden recall of `hits` or NaN, mass recall and kept share of `selected`, windows, tokens) of one document."""
    return (
        float(golden_recall(hits, served.labels, golden).nanmean()),
        float(mass_recall(selected, served.labels).nanmean()),
        float((selected.sum(dim=1) / served.visible).mean()),
        len(selected),
        served.document.meta.length,
    )


def _row(policy: str, task: str, budget: float | str, measured: list[tuple]) -> RecallRow:
    recalls, masses, kept, windows, lengths = zip(*measured, strict=True)
    defined = [value for value in recalls if value == value]
    return RecallRow(
        policy=policy,
        task=task,
        context=max(lengths),
        budget=budget,
        golden_recall=statistics.fmean(defined) if defined else None,
        mass_recall=statistics.fmean(masses),
        kept=statistics.fmean(kept),
        documents=len(measured),
        windows=sum(windows),
    )


def as_rows(rows: list[RecallRow]) -> list[dict]:
    """The rows as results.json holds them."""
    return [asdict(row) for row in rows]
