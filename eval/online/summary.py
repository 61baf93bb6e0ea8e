"""Rows of results.json made from the records of examples: accuracy, fidelity of text, depth by length."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from eval.online.answers import Record
from eval.online.check import wilson
from indexer_train.measure.intervals import bootstrap_means

Rows = list[dict[str, Any]]
DEPTH_BINS = 5


def accuracy_rows(records: list[Record], trained: int | None) -> Rows:
    """A row per benchmark, task, length, policy and budget.

    accuracy: mean score with its 95 % interval [low, high], Wilson's where scores are 0 or 1, else a bootstrap over
    examples; difference: from full attention on the same examples, bootstrap of the pairs; tokens: mean length;
    beyond: tokens / the longest training document; kept: resident tokens / all tokens; kv_mb: resident keys and
    values in 10^6 bytes, both over the tokens of each policy's own answer; left_out: examples that could not be asked
    or scored; of `indexer+fallback` also windows, and fallbacks, those of them under full attention.
    """
    rows = []
    for group, examples in _groups([record for record in records if record["benchmark"] != "text"]):
        answered = [record for record in examples if record["runs"]]
        full = _column(answered, ("full", None), "score")
        for key in _policies(answered):
            scores = _column(answered, key, "score")
            low, high = _interval(scores)
            _, difference_low, difference_high = _bootstrap(scores - full)
            rows.append(
                group
                | _usage(answered, key, trained)
                | {
                    "examples": len(answered),
                    "left_out": len(examples) - len(answered),
                    "accuracy": float(scores.mean()),
                    "low": low,
                    "high": high,
                    "difference": float((scores - full).mean()),
                    "difference_low": difference_low,
                    "difference_high": difference_high,
                }
            )
    return rows


def fidelity_rows(records: list[Record], trained: int | None) -> Rows:
    """A row per length of text, policy and budget.

    agreement: share of next tokens that are full attention's; kl: from full attention, nats per token; both with
    bootstrap intervals over texts; perplexity: of the text under the policy.
    """
    rows = []
    for group, texts in _groups([record for record in records if record["benchmark"] == "text" and record["runs"]]):
        for key in _policies(texts):
            agreement, kl = (_bootstrap(_column(texts, key, name)) for name in ("agreement", "kl"))
            rows.append(
                group
                | _usage(texts, key, trained)
                | {
                    "texts": len(texts),
                    "agreement": agreement[0],
                    "agreement_interval": agreement[1:],
                    "kl": kl[0],
                    "kl_interval": kl[1:],
                    "perplexity": math.exp(_column(texts, key, "loss").mean()),
                }
            )
    return rows


def left_out_lines(records: list[Record]) -> list[str]:
    """What was not asked or cannot be scored, and why."""
    found = Counter((record["benchmark"], record["task"], record["left_out"]) for record in records)
    return [f"left out: {n} of {benchmark} {task}: {why}" for (benchmark, task, why), n in found.items() if why]


def depth_rows(records: list[Record]) -> Rows:
    """Mean score of needle tasks by depth (bins of a fifth), length, policy and budget."""
    cells: dict[tuple, list[float]] = defaultdict(list)
    for record in records:
        if record["benchmark"] == "needles" and record["depth"] is not None:
            place = min(DEPTH_BINS - 1, int(record["depth"] * DEPTH_BINS))
            for run in record["runs"]:
                cells[run["policy"], run["budget"], place, record["length"]].append(run["score"])
    return [
        {"policy": policy, "budget": budget, "depth": [place / DEPTH_BINS, (place + 1) / DEPTH_BINS], "length": length,
         "accuracy": sum(scores) / len(scores), "examples": len(scores)}
        for (policy, budget, place, length), scores in cells.items()
    ]  # fmt: skip


def _groups(records: list[Record]) -> Iterator[tuple[dict[str, Any], list[Record]]]:
    """(benchmark, task and length, their records), in the order of the records."""
    found: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        found[record["benchmark"], record["task"], record["length"]].append(record)
    for (benchmark, task, length), members in found.items():
        yield {"benchmark": benchmark, "task": task, "length": length}, members


def _policies(records: list[Record]) -> list[tuple[str, float | None]]:
    return [(run["policy"], run["budget"]) for run in records[0]["runs"]] if records else []


def _column(records: list[Record], key: tuple[str, float | None], name: str) -> np.ndarray:
    """[examples] of one policy and budget."""
    return np.array([run[name] for r in records for run in r["runs"] if (run["policy"], run["budget"]) == key], float)


def _usage(records: list[Record], key: tuple[str, float | None], trained: int | None) -> dict[str, Any]:
    tokens = float(np.mean([record["tokens"] for record in records]))
    runs = [run for r in records for run in r["runs"] if (run["policy"], run["budget"]) == key]
    counted = {name: sum(run[name] for run in runs) for name in ("fallbacks", "windows") if name in runs[0]}
    return counted | {
        "policy": key[0],
        "budget": key[1],
        "tokens": tokens,
        "beyond": None if trained is None else tokens / trained,
        "kept": float(_column(records, key, "kept").mean()),
        "kv_mb": float(_column(records, key, "kv_bytes").mean()) / 1e6,
        "chunks": float(_column(records, key, "chunks").mean()),
    }


def _interval(scores: np.ndarray) -> tuple[float | None, float | None]:
    if np.isin(scores, (0, 1)).all():
        return wilson(int(scores.sum()), len(scores))
    return _bootstrap(scores)[1:]


def _bootstrap(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """(mean, low, high); no interval for fewer than two values."""
    mean, low, high = (float(each[0]) for each in bootstrap_means(values[:, None]))
    return mean, *(None if math.isnan(bound) else bound for bound in (low, high))
