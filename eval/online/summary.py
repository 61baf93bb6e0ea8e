"""Rows made from the records of examples: answers, text, depth by length, the decode check.

Intervals are 95 % ones: Wilson's where every value is 0 or 1, else a bootstrap over examples; of differences, always a
bootstrap over pairs of the same example.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from eval.online.records import Record, RunRecord
from eval.report.rows import AccuracyRow, AnswerRow, DecodeRow, DepthRow, FidelityRow
from indexer_train.measure.intervals import bootstrap_means

DEPTH_BINS = 5
Z = 1.96
"""Standard deviations on either side of a normal mean that hold 95 %."""
Lane = tuple[str, float | None]
"""A policy and its budget."""


def accuracy_rows(records: Sequence[Record], trained: int | None) -> list[AccuracyRow]:
    """A row per benchmark, task, length, policy and budget. trained: tokens of the longest training document."""
    rows = []
    for group, examples in _groups([record for record in records if record.benchmark != "text"]):
        answered = [record for record in examples if record.runs]
        full = column(answered, ("full", None), "score")
        for lane in lanes(answered):
            scores = column(answered, lane, "score")
            low, high = interval(scores)
            difference = paired(scores, full)
            rows.append(
                AccuracyRow(
                    **group,
                    **_usage(answered, lane, trained),
                    examples=len(answered),
                    left_out=len(examples) - len(answered),
                    accuracy=float(scores.mean()),
                    low=low,
                    high=high,
                    difference=difference.mean,
                    difference_low=difference.low,
                    difference_high=difference.high,
                )
            )
    return rows


def fidelity_rows(records: Sequence[Record], trained: int | None) -> list[FidelityRow]:
    """A row per length of text, policy and budget; intervals over texts."""
    rows = []
    for group, texts in _groups([record for record in records if record.benchmark == "text" and record.runs]):
        for lane in lanes(texts):
            agreement, kl = (bootstrap(column(texts, lane, name)) for name in ("agreement", "kl"))
            rows.append(
                FidelityRow(
                    **group,
                    **_usage(texts, lane, trained),
                    texts=len(texts),
                    agreement=agreement.mean,
                    agreement_interval=agreement[1:],
                    kl=kl.mean,
                    kl_interval=kl[1:],
                    perplexity=math.exp(column(texts, lane, "loss").mean()),
                )
            )
    return rows


def depth_rows(records: Sequence[Record]) -> list[DepthRow]:
    """Mean score of needle tasks by depth (bins of a fifth), length, policy and budget."""
    cells: dict[tuple[str, float | None, int, int | None], list[float]] = defaultdict(list)
    for record in records:
        if record.benchmark == "needles" and record.depth is not None:
            place = min(DEPTH_BINS - 1, int(record.depth * DEPTH_BINS))
            for run in record.runs:
                cells[run.policy, run.budget, place, record.length].append(_value(run, "score"))
    return [
        DepthRow(
            policy=policy, budget=budget, depth=(place / DEPTH_BINS, (place + 1) / DEPTH_BINS), length=length,
            accuracy=sum(scores) / len(scores), examples=len(scores),
        )
        for (policy, budget, place, length), scores in cells.items()
    ]  # fmt: skip


def decode_rows(questions: Sequence[Record], texts: Sequence[Record]) -> list[DecodeRow]:
    """A row per policy of needle questions, whose scores are 0 or 1, and followed texts.

    chunks, kv_share and kv_mb are those of the questions where there are any. A policy that is right ends before the
    others to the same question, whose later tokens see more: policies that keep alike differ a little in these.
    """
    rows = []
    for lane in lanes([*questions, *texts]):
        correct = column(questions, lane, "score")
        low, high = wilson(int(correct.sum()), len(correct))
        followed, used = _runs(texts, lane), _runs(questions, lane) or _runs(texts, lane)
        rows.append(
            DecodeRow(
                policy=lane[0],
                correct=int(correct.sum()),
                examples=len(correct),
                low=low,
                high=high,
                agreement=statistics.fmean(_value(run, "agreement") for run in followed) if followed else None,
                kl=statistics.fmean(_value(run, "kl") for run in followed) if followed else None,
                texts=len(followed),
                chunks=statistics.fmean(run.chunks for run in used),
                kv_share=statistics.fmean(run.kept for run in used),
                kv_mb=statistics.fmean(run.kv_bytes for run in used) / 1e6,
                refreshes=max((run.refreshes for run in followed), default=0),
                **_fetches(used),
            )
        )
    return rows


def answer_rows(questions: Sequence[Record], values: dict[str, list[str]]) -> list[AnswerRow]:
    """What every policy answered. values: what a right answer holds, by the question's name."""
    return [
        AnswerRow(
            document=record.name,
            task=record.task,
            values=values[record.name],
            said={run.policy: run.response or "" for run in record.runs},
        )
        for record in questions
    ]


def left_out_lines(records: Sequence[Record]) -> list[str]:
    """What was not asked or cannot be scored, and why."""
    found = Counter((record.benchmark, record.task, record.left_out) for record in records)
    return [f"left out: {n} of {benchmark} {task}: {why}" for (benchmark, task, why), n in found.items() if why]


class Estimate(NamedTuple):
    """A mean and the ends of its interval, None where there are too few examples."""

    mean: float
    low: float | None
    high: float | None


def interval(scores: np.ndarray) -> tuple[float | None, float | None]:
    """Of the mean of `scores` [examples]: Wilson's where all are 0 or 1, else a bootstrap."""
    if np.isin(scores, (0, 1)).all():
        return wilson(int(scores.sum()), len(scores))
    return bootstrap(scores)[1:]


def paired(values: np.ndarray, others: np.ndarray) -> Estimate:
    """Mean difference on the same examples, values - others [examples], with a bootstrap over the pairs."""
    difference = values - others
    return Estimate(float(difference.mean()), *bootstrap(difference)[1:])


def bootstrap(values: np.ndarray) -> Estimate:
    """The mean of `values` [examples], at least one; no interval for fewer than two."""
    mean, low, high = (float(each[0]) for each in bootstrap_means(values[:, None]))
    return Estimate(mean, *(None if math.isnan(bound) else bound for bound in (low, high)))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, Z * Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def lanes(records: Sequence[Record]) -> list[Lane]:
    """Policies and budgets in the order of the first record's runs."""
    return [(run.policy, run.budget) for run in records[0].runs] if records else []


def column(records: Sequence[Record], lane: Lane, name: str) -> np.ndarray:
    """A number of every run of one policy and budget, [examples]."""
    return np.array([_value(run, name) for run in _runs(records, lane)], float)


def _runs(records: Sequence[Record], lane: Lane) -> list[RunRecord]:
    return [run for record in records for run in record.runs if (run.policy, run.budget) == lane]


def _value(run: RunRecord, name: str) -> float:
    value = getattr(run, name)
    if value is None:
        raise ValueError(f"a run under {run.policy} has no {name}")
    return value


def _groups(records: Sequence[Record]) -> Iterator[tuple[dict[str, Any], list[Record]]]:
    """(benchmark, task and length, their records), in the order of the records."""
    found: dict[tuple[str, str, int | None], list[Record]] = defaultdict(list)
    for record in records:
        found[record.benchmark, record.task, record.length].append(record)
    for (benchmark, task, length), members in found.items():
        yield {"benchmark": benchmark, "task": task, "length": length}, members


def _fetches(runs: Sequence[RunRecord]) -> dict[str, float]:
    """What runs fetched, and the mean keys they held for it; {} where that is not counted."""
    if runs[0].fetched is None:
        return {}
    return {
        "fetched": statistics.fmean(_value(run, "fetched") for run in runs),
        "mean_key_mb": statistics.fmean(_value(run, "mean_key_bytes") for run in runs) / 1e6,
    }


def _usage(records: Sequence[Record], lane: Lane, trained: int | None) -> dict[str, Any]:
    tokens, runs = float(np.mean([record.tokens for record in records])), _runs(records, lane)
    counted = {name: sum(getattr(run, name) for run in runs) for name in ("fallbacks", "windows")} if (
        runs[0].windows is not None
    ) else {}  # fmt: skip
    return (
        counted
        | _fetches(runs)
        | {
            "policy": lane[0],
            "budget": lane[1],
            "tokens": tokens,
            "beyond": None if trained is None else tokens / trained,
            "kept": float(column(records, lane, "kept").mean()),
            "kv_mb": float(column(records, lane, "kv_bytes").mean()) / 1e6,
            "chunks": float(column(records, lane, "chunks").mean()),
        }
    )
