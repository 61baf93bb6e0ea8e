"""Recall of golden chunks and of attention mass on held-out traces: every chunk scored, every policy, every budget."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any, NamedTuple, SupportsFloat, TypeVar

import numpy as np
import torch

from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import DocumentMeta
from eval.offline.policies import golden_oracle, policies
from eval.report.rows import Interval, Ratios, RatiosOf, RecallRow
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import RATIOS, DocumentScorer, ServedWindows, Tally, ranked_tally, tally
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import join_layers
from indexer_train.selection import Selection

BUDGETS = (0.02, 0.05, 0.1, 0.135, 0.2)
TOP = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of chunks K at which recall@K is measured, where some document of the store has more."""
PIECE_ELEMENTS = 1 << 21
"""Windows x chunks measured at once: what evaluation holds does not grow with the number of windows."""
PLAIN_TASKS = ("text", "document", "chat")
AnyRecall = TypeVar("AnyRecall", bound=RecallRow)


class Ranker(NamedTuple):
    """Who ranked the chunks: an indexer, one of its layers, or a policy; fields as in `RecallRow`."""

    policy: str
    indexer: str | None = None
    layer: int | None = None


class Amount(NamedTuple):
    """How much it may keep. budget: a share of the chunks, "threshold", "coverage", or "top K", and then `top` is K."""

    budget: float | str
    top: int | None = None

    def counts(self, served: ServedWindows) -> torch.Tensor:
        """[W] chunks that this buys in each window; a calibrated rule's number is not known before."""
        if isinstance(self.budget, float):
            return served.kept(self.budget)
        assert self.top is not None
        return torch.full_like(served.visible, self.top)


THRESHOLD, COVERAGE = Amount("threshold"), Amount("coverage")


class Group(NamedTuple):
    """Documents that are averaged together. task: its name in tables; length, depth: the ends of the bins that it is
    made of, None where it is not."""

    task: str
    length: tuple[int, int] | None = None
    depth: tuple[float, float] | None = None


@dataclass(frozen=True)
class DocumentRecall:
    """One document ranked by `ranker`, of which `amount` was kept.

    macro: means over its windows, by metric; sums: its windows added up.
    """

    meta: DocumentMeta
    ranker: Ranker
    amount: Amount
    macro: dict[str, float]
    sums: Tally


def measure(
    indexers: dict[str, MemoryIndexer],
    store: TraceStore,
    golden: float,
    rules: Mapping[str, Sequence[Selection]],
    every_token: bool = False,
    budgets: Sequence[float] = BUDGETS,
    baselines: bool = True,
) -> Iterator[DocumentRecall]:
    """Every document of `store` under every indexer (by name), its layers and, if asked, what needs no training.

    rules: calibrated ones of indexers by name, one of a kind; one without is measured at the budgets alone. Documents
    without a window, or that need nothing in any, are left out.
    """
    amounts = amounts_of(store, budgets)
    for document in store:
        yield from measure_document(indexers, document, golden, rules, every_token, amounts, baselines)


def amounts_of(store: TraceStore, budgets: Sequence[float]) -> list[Amount]:
    """`budgets`, and every K of TOP that is fewer than the chunks of the store's longest document."""
    longest = max(document.chunks for document in store)
    return [*map(Amount, budgets), *(Amount(f"top {count}", count) for count in TOP if count < longest)]


def measure_document(
    indexers: dict[str, MemoryIndexer],
    document: TraceDocument,
    golden: float,
    rules: Mapping[str, Sequence[Selection]],
    every_token: bool,
    amounts: list[Amount],
    baselines: bool = True,
) -> Iterator[DocumentRecall]:
    """One document, as `measure` does each."""
    windows = document.windows(serving=not every_token)
    scorers = {name: DocumentScorer(indexer, document) for name, indexer in indexers.items()}
    untrained = policies(document, golden) if baselines else {}
    pieces: dict[tuple[Ranker, Amount], list[Tally]] = defaultdict(list)
    for served in in_pieces(document, windows, measured_on(indexers)):
        counts = torch.stack([amount.counts(served) for amount in amounts], dim=1)
        for name, scorer in scorers.items():
            layers = scorer.layer_logits(served)
            joined = join_layers(layers, scorer.indexer.spec.shape.join)
            alone = zip(scorer.indexer.spec.layers, layers, strict=True) if len(layers) > 1 else ()
            prefix = "" if name == "indexer" else f"{name} "
            scored = {Ranker(name, name): joined}
            scored |= {Ranker(f"{prefix}layer {layer}", name, layer): scores for layer, scores in alone}
            for ranker, scores in scored.items():
                for rule in rules.get(name, []):
                    asked = rule.choose(scores, served.labels.candidate, served.positions, served.chunking)
                    pieces[ranker, Amount(rule.by)].append(tally(asked, served.labels, golden, served.visible))
                ranked = ranked_tally(scores, served.labels, golden, served.visible, counts)
                _add(pieces, ranker, amounts, ranked)
        for policy, score in untrained.items():
            asked = torch.zeros_like(counts) if policy == "protected" else counts
            found = ranked_tally(score(served), served.labels, golden, served.visible, asked)
            if policy == "oracle":  # each metric has a bound of its own
                best = ranked_tally(golden_oracle(served), served.labels, golden, served.visible, asked)
                found = replace(found, hits=best.hits)
            _add(pieces, Ranker(policy), amounts, found)
    for (ranker, amount), parts in pieces.items():
        whole = Tally.concatenate(parts).on_host()
        if whole.needed.any():
            macro = {name: float(value.nanmean()) for name, value in whole.ratios().items()}
            yield DocumentRecall(document.meta, ranker, amount, macro, whole.total())


def task_groups(meta: DocumentMeta) -> list[str]:
    """The groups a document counts in: its task, and all needle tasks together."""
    return [meta.task] if meta.task in PLAIN_TASKS else [meta.task, "needles"]


def by_task(meta: DocumentMeta) -> list[Group]:
    """`task_groups`, to average by."""
    return [Group(task) for task in task_groups(meta)]


def recall_rows(
    found: list[DocumentRecall], kind: type[AnyRecall], groups: Callable[[DocumentMeta], list[Group]]
) -> list[AnyRecall]:
    """Average documents group by group: rows of `kind`, whose bins its groups have.

    groups: which ones a document counts in.
    """
    cells: dict[tuple[Ranker, Group, Amount], list[DocumentRecall]] = defaultdict(list)
    for each in found:
        for group in groups(each.meta):
            cells[each.ranker, group, each.amount].append(each)
    return [_row(kind, *cell, members) for cell, members in cells.items()]


def _row(
    kind: type[AnyRecall], ranker: Ranker, group: Group, amount: Amount, members: list[DocumentRecall]
) -> AnyRecall:
    means, lows, highs = bootstrap_means(np.array([[each.macro[name] for name in RATIOS] for each in members]))
    sums = Tally.concatenate([each.sums for each in members]).total()
    intervals: dict[str, Interval | None] = {
        name: None if np.isnan(low) else (float(low), float(high))
        for name, low, high in zip(RATIOS, lows, highs, strict=True)
    }
    return kind(
        **ranker._asdict(),
        **{name: value for name, value in group._asdict().items() if value is not None},
        context=max(each.meta.length for each in members),
        **amount._asdict(),
        **ratios(dict(zip(RATIOS, means, strict=True))),
        micro=Ratios(**ratios(sums.ratios())),
        interval=RatiosOf[Interval](**intervals),
        documents=len(members),
        windows=int(sums.windows),
    )


def ratios(values: Mapping[str, SupportsFloat]) -> dict[str, Any]:
    """The metrics as results.json holds them: None where nothing was there to divide by."""
    return {name: None if isnan(float(value)) else float(value) for name, value in values.items()}


def measured_on(indexers: Mapping[str, MemoryIndexer]) -> torch.device:
    """Where documents are measured: on the indexers' device."""
    return next(iter(indexers.values())).device


def in_pieces(
    document: TraceDocument, windows: torch.Tensor, device: torch.device | None = None
) -> Iterator[ServedWindows]:
    """`windows` ([W, 2]) a few at a time, in order, to be measured on `device` (None: the host)."""
    for piece in windows.split(max(1, PIECE_ELEMENTS // max(1, document.chunks))):
        if len(piece):
            yield ServedWindows.of(document, piece, device)


def _add(pieces: dict[tuple[Ranker, Amount], list[Tally]], ranker: Ranker, amounts: list[Amount], found: Tally) -> None:
    for place, amount in enumerate(amounts):
        pieces[ranker, amount].append(Tally(**{name: value[:, place] for name, value in vars(found).items()}))
