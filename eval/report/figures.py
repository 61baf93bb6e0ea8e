"""The report's pictures of answers, text and recall.

Each takes rows of results.json (rows.py) and gives a figure, None where nothing is to draw.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_gen.core.files import write_atomically
from eval.report.rows import (
    AccuracyRow,
    CellRecall,
    DecodeRow,
    DepthRow,
    FidelityRow,
    RecallRow,
)
from eval.report.tables import GROUPS, STYLES, depth_name, length_name


def accuracy_against_bytes(rows: Sequence[DecodeRow]) -> Figure | None:
    """Accuracy of answers, with 95 % intervals, against the KV bytes that were resident."""
    points = [row for row in rows if row.examples]
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for row in points:
        share = row.correct / row.examples
        spread = [[max(0.0, share - row.low)], [max(0.0, row.high - share)]]
        axis.errorbar(row.kv_mb, share, spread, fmt="o", color=_style(row.policy)[0], capsize=3, ms=6, label=row.policy)
    axis.set_xlim(0, 1.06 * max(row.kv_mb for row in points))
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("resident KV cache, MB")
    axis.set_ylabel("questions answered, share")
    return finished(figure, [axis])


def kl_against_bytes(decoded: Sequence[DecodeRow], followed: Sequence[FidelityRow]) -> Figure | None:
    """KL of the next token from full attention against resident KV bytes: a panel for `decode`, one for each length of
    the benchmark's texts, with 95 % intervals over texts where there are any."""
    panels: dict[str, list[tuple[str, float, float, Sequence[float | None]]]] = {}
    for row in decoded:
        if row.kl is not None and row.policy != "full":
            panels.setdefault("decode", []).append((row.policy, row.kv_mb, row.kl, (None, None)))
    for row in followed:
        if row.policy != "full":
            point = (row.policy, row.kv_mb, row.kl, row.kl_interval)
            panels.setdefault(f"{row.benchmark}, {row.tokens:,.0f} tokens", []).append(point)
    if not panels:
        return None
    figure, grid = _grid(len(panels), 3, 3.3)
    for axis, (title, points) in zip(grid, panels.items(), strict=True):
        for policy in dict.fromkeys(policy for policy, *_ in points):
            for place, (_, mb, kl, (low, high)) in enumerate(point for point in points if point[0] == policy):
                spread = None if low is None or high is None else [[max(0.0, kl - low)], [max(0.0, high - kl)]]
                label = None if place else policy
                axis.errorbar(mb, kl, spread, fmt="o", color=_style(policy)[0], capsize=3, ms=5, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.06 * max(mb for _, mb, *_ in points))
        axis.set_ylim(0, 1.06 * max(high or kl for *_, kl, (_, high) in points))
        axis.set_xlabel("resident KV cache, MB")
    grid[0].set_ylabel("KL from full attention, nats a token")
    return finished(figure, grid)


def accuracy_by_bytes(rows: Sequence[AccuracyRow]) -> Figure | None:
    """A panel per benchmark and length: mean accuracy over its tasks against resident KV bytes, a line per policy."""
    panels = list(dict.fromkeys((row.benchmark, row.length) for row in rows))
    if not panels:
        return None
    figure, grid = _grid(len(panels), 4, 2.7, sharey=True)
    for axis, (benchmark, length) in zip(grid, panels, strict=True):
        members = [row for row in rows if (row.benchmark, row.length) == (benchmark, length)]
        for policy in dict.fromkeys(row.policy for row in members):
            budgets = list(dict.fromkeys(row.budget for row in members if row.policy == policy))
            points = [_mean(members, policy, budget) for budget in budgets]
            color, style = _style(policy)
            marker = {"full": "s", "oracle": "^"}.get(policy, "o")
            axis.plot(*zip(*points, strict=True), style, color=color, marker=marker, ms=5, label=policy, alpha=0.8)
        tokens = np.mean([row.tokens for row in members])
        axis.set_title(f"{benchmark}, {tokens:,.0f} tokens", fontsize=9)
        axis.set_xlim(0, 1.06 * max(row.kv_mb for row in members))
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("resident KV cache, MB")
    grid[0].set_ylabel("accuracy, mean over tasks")
    return finished(figure, grid)


def answers_by_depth(rows: Sequence[DepthRow]) -> Figure | None:
    """Heat maps, one per policy at the smallest budget: accuracy of needle tasks by depth and length."""
    if not rows:
        return None
    least = min((row.budget for row in rows if row.budget is not None), default=None)
    rows = [row for row in rows if row.budget in (None, least)]
    policies = list(dict.fromkeys(row.policy for row in rows))
    depths = sorted({row.depth for row in rows})
    lengths = sorted({row.length or 0 for row in rows})
    wide, high = 0.9 + 0.55 * len(lengths), 0.9 + 0.5 * len(depths)
    columns = max(1, min(len(policies), int(12 / wide)))
    lines = -(-len(policies) // columns)
    figure = Figure(figsize=(1.8 + wide * columns, 0.3 + high * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(policies) :]:
        axis.remove()
    shown = list(axes.flat[: len(policies)])
    for axis, policy in zip(shown, policies, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in (row for row in rows if row.policy == policy):
            place = depths.index(row.depth), lengths.index(row.length or 0)
            grid[place] = row.accuracy
            _cell(axis, place, row.accuracy, row.examples, 7)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [depth_name(depth) for depth in depths], fontsize=8)
        axis.set_title(policy, fontsize=9)
    shown[0].set_ylabel("depth of the needle")
    figure.supxlabel("tokens", fontsize=9)
    figure.colorbar(image, ax=shown, shrink=0.8)
    return figure


def recall_curves(rows: Sequence[RecallRow]) -> Figure | None:
    """Mass recall (top) and golden recall (bottom) against the share kept, with 95 % bands of the indexers."""
    rows = [row for row in rows if row.policy in STYLES and isinstance(row.budget, float)]
    tasks = [task for task in GROUPS if any(row.task == task for row in rows)]
    if not tasks:
        return None
    figure = Figure(figsize=(1.6 + 4.1 * len(tasks), 6.6), layout="constrained")
    axes = figure.subplots(2, len(tasks), sharex=True, squeeze=False)
    for column, task in enumerate(tasks):
        for axis, metric in zip(axes[:, column], ("mass_recall", "golden_recall"), strict=True):
            for policy, (color, style) in STYLES.items():
                points = [row for row in rows if (row.task, row.policy) == (task, policy)]
                points = [row for row in points if getattr(row, metric) is not None]
                if points and policy != "protected":
                    xs = [100 * row.budget for row in points if isinstance(row.budget, float)]
                    ys = [getattr(row, metric) for row in points]
                    axis.plot(xs, ys, style, color=color, marker="o", ms=3, label=policy)
                    bands = [getattr(row.interval, metric) or [getattr(row, metric)] * 2 for row in points]
                    if points[0].indexer is not None:
                        axis.fill_between(xs, *zip(*bands, strict=True), color=color, alpha=0.15, lw=0)
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
        documents = next(row.documents for row in rows if row.task == task)
        axes[0][column].set_title(f"{task}: {documents} documents")
        axes[1][column].set_xlabel("chunks kept, % (protected apart)")
    axes[0][0].set_ylabel("attention-mass recall (macro)")
    axes[1][0].set_ylabel("golden-chunk recall (macro)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def plot_recall(rows: Sequence[RecallRow], path: Path) -> None:
    """`recall_curves` as a PNG."""
    if (figure := recall_curves(rows)) is not None:
        write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def depth_by_length(rows: Sequence[CellRecall], bins: tuple[list[str], list[str]]) -> Figure | None:
    """Heat map: mass and golden recall of the indexer by the needle's depth and the document's length.

    bins: names of all depths and lengths in order; those between the first and the last with a document are shown.
    """
    if not rows:
        return None
    depths = _between([depth_name(row.depth) for row in rows], bins[0])
    lengths = _between([length_name(row.length) for row in rows], bins[1])
    figure = Figure(figsize=(3 + 2.3 * len(lengths), 1.6 + 0.62 * len(depths)), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, ("mass_recall", "golden_recall"), strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in rows:
            place = depths.index(depth_name(row.depth)), lengths.index(length_name(row.length))
            if (value := getattr(row, metric)) is not None:
                grid[place] = value
            _cell(axis, place, value, row.documents, 8)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), lengths, fontsize=8)
        axis.set_yticks(range(len(depths)), depths, fontsize=8)
        axis.set_title(f"{metric.replace('_', ' ')} (macro)")
        axis.set_xlabel("document length, tokens")
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("depth of the needle")
    return figure


def _style(policy: str) -> tuple[str, str]:
    """Line colour and style, those of full attention and of unknown policies included."""
    return ("black", "-") if policy == "full" else STYLES.get(policy, ("tab:brown", "-"))


def _grid(panels: int, columns: int, inches: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """As many panels as asked, `columns` in a line at most."""
    columns = min(columns, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(1.8 + inches * columns, 0.4 + inches * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, list(axes.flat[:panels])


def _mean(rows: Sequence[AccuracyRow], policy: str, budget: float | None) -> tuple[float, float]:
    """(MB, accuracy), means over tasks."""
    found = [row for row in rows if (row.policy, row.budget) == (policy, budget)]
    return float(np.mean([row.kv_mb for row in found])), float(np.mean([row.accuracy for row in found]))


def _between(found: list[str], bins: list[str]) -> list[str]:
    """The bins from the first to the last that is `found`."""
    places = [bins.index(name) for name in found]
    return bins[min(places) : max(places) + 1]


def _cell(axis: Axes, place: tuple[int, int], value: float | None, count: int, size: int) -> None:
    """Write a cell of a heat map: its value and how many examples are behind it."""
    shown = "-" if value is None else f"{value:.2f}"
    color = "white" if value is not None and value < 0.5 else "black"
    axis.text(place[1], place[0], f"{shown}\nn={count}", ha="center", va="center", fontsize=size, color=color)


def finished(figure: Figure, axes: Iterable[Axes]) -> Figure:
    """Grids, and one legend of what any panel shows."""
    handles = {}
    for axis in axes:
        axis.grid(alpha=0.3)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False)
    return figure
