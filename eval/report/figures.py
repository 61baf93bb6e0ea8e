"""The report's pictures: each takes a section of results.json and gives a figure, None where nothing is to draw."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from eval.report.tables import STYLES

Rows = list[dict[str, Any]]


def recall_curves(rows: Rows) -> Figure | None:
    """Mass recall (top) and golden recall (bottom) against the share kept, with 95 % bands of the indexers."""
    rows = [row for row in rows if row["policy"] in STYLES and isinstance(row["budget"], float)]
    tasks = [task for task in ("needles", "text", "document", "chat") if any(row["task"] == task for row in rows)]
    tasks = tasks or sorted({row["task"] for row in rows})[:4]
    if not tasks:
        return None
    figure, axes = pyplot.subplots(
        2, len(tasks), figsize=(1.6 + 4.1 * len(tasks), 6.6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, task in enumerate(tasks):
        for axis, metric in zip(axes[:, column], ("mass_recall", "golden_recall"), strict=True):
            for policy, (color, style) in STYLES.items():
                points = [row for row in rows if (row["task"], row["policy"]) == (task, policy)]
                points = [row for row in points if row[metric] is not None]
                if points and policy != "protected":
                    xs = [100 * row["budget"] for row in points]
                    axis.plot(xs, [row[metric] for row in points], style, color=color, marker="o", ms=3, label=policy)
                    bands = [row["interval"][metric] or [row[metric]] * 2 for row in points]
                    if policy in ("indexer", "A", "B"):
                        axis.fill_between(xs, *zip(*bands, strict=True), color=color, alpha=0.15, lw=0)
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
        documents = next(row["documents"] for row in rows if row["task"] == task)
        axes[0][column].set_title(f"{task}: {documents} documents")
        axes[1][column].set_xlabel("chunks kept, % (protected apart)")
    axes[0][0].set_ylabel("attention-mass recall (macro)")
    axes[1][0].set_ylabel("golden-chunk recall (macro)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def accuracy_against_bytes(rows: Rows) -> Figure | None:
    """Accuracy of answers, with 95 % intervals, against the KV bytes that were resident."""
    points = [row for row in rows if row["examples"]]
    if not points:
        return None
    figure, axis = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for row in points:
        color = "black" if row["policy"] == "full" else STYLES.get(row["policy"], ("tab:brown", "-"))[0]
        share = row["correct"] / row["examples"]
        spread = [[max(0.0, share - row["low"])], [max(0.0, row["high"] - share)]]
        axis.errorbar(row["kv_mb"], share, spread, fmt="o", color=color, capsize=3, ms=6, label=row["policy"])
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1)
    axis.set_xlabel("resident KV cache, MB")
    axis.set_ylabel("questions answered, share")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def reliability_curve(bins: Rows) -> Figure | None:
    """Chunks from the lowest scores to the highest: the golden share that was observed, and the sigmoid's."""
    if not bins:
        return None
    figure, axis = pyplot.subplots(figsize=(5.4, 3.8), layout="constrained")
    ends = 100 * np.cumsum([each["chunks"] for each in bins]) / sum(each["chunks"] for each in bins)
    middles = (ends + np.concatenate([[0], ends[:-1]])) / 2
    axis.plot(middles, [100 * each["observed"] for each in bins], "o-", color="tab:red", ms=4, label="observed: golden")
    axis.plot(
        middles, [100 * each["predicted"] for each in bins], "s:", color="gray", ms=3, label="sigmoid of the score"
    )
    axis.set_xlabel("chunks by score, percentile")
    axis.set_ylabel("share, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def threshold_transfer(documents: Rows, budget: float) -> Figure | None:
    """What the one calibrated threshold kept of each held-out document, and the recall it had there, by length."""
    if not documents:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    plain = {row["task"] for row in documents if row["depth"] is None}
    for axis, metric in zip(axes, ("kept", "mass_recall"), strict=True):
        for label, color, chosen in (("needles", "tab:blue", False), (" and ".join(sorted(plain)), "tab:orange", True)):
            some = [row for row in documents if (row["depth"] is None) is chosen and row[metric] is not None]
            if some:
                axis.scatter(
                    [r["length"] for r in some], [100 * r[metric] for r in some], color=color, s=18, label=label
                )
        axis.set_xlabel("document length, tokens")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].axhline(100 * budget, ls="--", color="black", lw=1, label="budget")
    axes[0].set_ylabel("chunks kept by the threshold, %")
    axes[1].set_ylabel("mass recall at the threshold (document's mean), %")
    axes[0].legend(frameon=False)
    return figure


def depth_by_length(rows: Rows, bins: tuple[list[str], list[str]]) -> Figure | None:
    """Heat map: mass and golden recall of the indexer by the needle's depth and the document's length.

    bins: names of all depths and lengths in order; those between the first and the last with a document are shown.
    """
    if not rows:
        return None
    cells = {tuple(row["task"].split(" | ")): row for row in rows}
    depths, lengths = (_between([place[axis] for place in cells], bins[axis]) for axis in (0, 1))
    figure, axes = pyplot.subplots(
        1, 2, figsize=(3 + 2.3 * len(lengths), 1.6 + 0.62 * len(depths)), layout="constrained"
    )
    for axis, metric in zip(axes, ("mass_recall", "golden_recall"), strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for (depth, length), row in cells.items():
            place = depths.index(depth), lengths.index(length)
            grid[place] = np.nan if row[metric] is None else row[metric]
            shown = "-" if row[metric] is None else f"{row[metric]:.2f}"
            dark = row[metric] is not None and row[metric] < 0.5
            axis.text(place[1], place[0], f"{shown}\nn={row['documents']}", ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), lengths, fontsize=8)
        axis.set_yticks(range(len(depths)), depths, fontsize=8)
        axis.set_title(f"{metric.replace('_', ' ')} (macro)")
        axis.set_xlabel("document length, tokens")
        figure.colorbar(image, ax=axis)
    axes[0].set_ylabel("depth of the needle")
    return figure


def _between(found: list[str], bins: list[str]) -> list[str]:
    """The bins from the first to the last that is `found`."""
    places = [bins.index(name) for name in found]
    return bins[min(places) : max(places) + 1]
