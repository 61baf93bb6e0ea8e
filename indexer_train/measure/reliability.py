"""How far an indexer's scores can be trusted, and the calibration of a saved one.

INDEXER/calibration.json    every way of selecting that was tried, and the bins of the plot
INDEXER/reliability.png
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from data_gen.traces.store import TraceStore
from indexer_train.config import Rule
from indexer_train.losses import gives_probabilities
from indexer_train.measure.calibration import (
    ScoredWindows,
    calibrate,
    calibrate_coverage,
    measure,
    score_windows,
    task_mean,
)
from indexer_train.measure.metrics import served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Coverage, Selection, Target, Threshold, served_first

BINS = 20


@dataclass(frozen=True)
class Bin:
    """Chunks of similar scores. predicted: mean of sigmoid(score); observed: share of them that is golden."""

    predicted: float
    observed: float
    chunks: int


@dataclass(frozen=True)
class Calibrated:
    """rows: what each way of selecting keeps and finds, by length; error: see `calibration_error`, None where the loss
    trained an order, so that a sigmoid of the score means nothing; plot: its file; beyond: the asked length past which
    nothing was measured, so that its score holds for all longer ones."""

    rows: list[dict[str, Any]]
    error: float | None
    plot: Path
    beyond: int | None


def reliability(scores: torch.Tensor, golden: torch.Tensor) -> list[Bin]:
    """Candidates in bins of equal counts, from the lowest scores to the highest. scores: [M]; golden: [M] bool."""
    order = scores.argsort()
    parts = zip(scores[order].double().sigmoid().chunk(BINS), golden[order].double().chunk(BINS), strict=True)
    return [Bin(float(p.mean()), float(t.mean()), len(p)) for p, t in parts]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of predicted and observed, each chunk counted once."""
    return sum(each.chunks * abs(each.predicted - each.observed) for each in bins) / sum(each.chunks for each in bins)


def calibrate_folder(
    folder: Path,
    indexer: MemoryIndexer,
    store: TraceStore,
    golden: float,
    target: tuple[Target, float],
    longest: Sequence[int],
    by: Rule = "threshold",
) -> Calibrated:
    """Calibrate the indexer saved in `folder` and store what it is served with there.

    target: what the threshold is for; longest: see `calibrate`; by: the rule that is served, beside which the threshold
    is kept: the budget itself, or a coverage for the same target. Raises InputError on training traces, and see
    `calibrate`.
    """
    store.check_held_out()
    scored = score_windows(indexer, served_windows(store))
    if not scored:
        raise InputError(f"{store.root}: no document with a whole lookahead window to calibrate on")
    threshold = calibrate(scored, *target, longest)
    calibrated: list[Threshold | Coverage] = [threshold]
    selections = served_first(threshold, indexer.spec.selections)
    if by == "budget":
        selections = served_first(Budget(budget=target[1]), selections)
    if by == "coverage":
        calibrated.append(coverage := calibrate_coverage(scored, *target))
        selections = served_first(coverage, selections)
    indexer.spec.selections = selections
    masks = [each.served.labels.candidate for each in scored]
    bins = reliability(
        torch.cat([each.scores[mask] for each, mask in zip(scored, masks, strict=True)]),
        torch.cat([each.served.labels.golden(golden)[mask] for each, mask in zip(scored, masks, strict=True)]),
    )
    rows = [row for each in selections for row in _measure(scored, each, longest, golden)]
    content = {"traces": store.manifest.documents, "rows": rows, "reliability": [asdict(each) for each in bins]}
    made = indexer.spec.provenance
    if made is not None:
        kept = [row for row in made.metrics if row.data != "calibration"]
        made.metrics = kept + measure(scored, selections, golden, "calibration")
    write_atomically(folder / "calibration.json", lambda file: file.write_text(json.dumps(content, indent=1)))
    error = calibration_error(bins) if gives_probabilities(made and made.train.get("loss")) else None
    _plot(scored, bins, error, calibrated, golden, folder / "reliability.png")
    indexer.save_spec(folder)
    beyond = max(longest) if len(threshold.cuts) == len(set(longest)) else None
    return Calibrated(rows, error, folder / "reliability.png", beyond)


def _measure(
    scored: Sequence[ScoredWindows], selection: Selection, longest: Sequence[int], golden: float
) -> list[dict[str, Any]]:
    """What one way of selecting does in contexts of each length."""
    rows = []
    ends = sorted(set(longest))
    for low, high in zip([0, *ends], [*ends, None], strict=True):
        means: dict[str, list[torch.Tensor]] = {}
        windows = 0
        for each in scored:
            length = each.served.positions + 1
            inside = (length > low) & (length <= (high or length.max()))
            windows += int(inside.sum())
            for name, values in each.means(selection, golden).items():
                means.setdefault(name, []).append(values.masked_fill(~inside, torch.nan))
        if windows:
            row = {"selection": str(selection), "tokens up to": high or "any", "windows": windows}
            rows.append(row | {name: task_mean(scored, values)[""] for name, values in means.items()})
    return rows


def _plot(
    scored: Sequence[ScoredWindows],
    bins: Sequence[Bin],
    error: float | None,
    calibrated: Sequence[Threshold | Coverage],
    golden: float,
    path: Path,
) -> None:
    """Left: golden chunks by score, and what its sigmoid predicts where there is an `error`; right: what the rules
    keep and find, beside budgets of the same size."""
    figure = Figure(figsize=(9, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    middles = [100 * (place + 0.5) / len(bins) for place in range(len(bins))]
    left.plot(middles, [each.observed for each in bins], "o-", color="tab:red", ms=4, label="observed: golden")
    if error is not None:
        left.plot(middles, [each.predicted for each in bins], "s:", color="gray", ms=3, label="sigmoid of the score")
        left.set_title(f"calibration error {error:.3f}")
    left.set_xlabel("chunks by score, percentile")
    left.set_ylabel("share of chunks")
    left.legend(fontsize=8)
    budgets = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    drawn: list[tuple[str, str, Sequence[Selection]]] = [
        ("one threshold", "o-", [calibrate(scored, "budget", share) for share in budgets]),
        ("budget (top-k)", "s--", [Budget(budget=share) for share in budgets]),
    ]
    if len(calibrated) > 1:
        drawn.append(("one coverage", "^:", [calibrate_coverage(scored, "budget", share) for share in budgets]))
    drawn += [(f"{one.by} calibrated: {one.target} {one.value:.1%}", "*", [one]) for one in calibrated]
    for label, style, selections in drawn:
        points = [measure(scored, [one], golden, "")[-1].values for one in selections]
        kept, recall = ([point[name] for point in points] for name in ("kept", "mass_recall"))
        right.plot(kept, recall, style, label=label, ms=12 if style == "*" else 4)
    right.set_xlabel("share of chunks kept")
    right.set_ylabel("attention-mass recall")
    right.set_ylim(0, 1)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
