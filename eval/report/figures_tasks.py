"""The report's pictures of the benchmark: accuracy against KV bytes, and where in the text the needle was."""

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from eval.report.tables import STYLES

Rows = list[dict[str, Any]]


def accuracy_by_bytes(rows: Rows) -> Figure | None:
    """A panel per benchmark and length: mean accuracy over its tasks against resident KV bytes, a line per policy."""
    panels = list(dict.fromkeys((row["benchmark"], row["length"]) for row in rows))
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (1.8 + 2.7 * columns, 0.4 + 2.7 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (benchmark, length) in zip(axes.flat, panels, strict=False):
        members = [row for row in rows if (row["benchmark"], row["length"]) == (benchmark, length)]
        for policy in dict.fromkeys(row["policy"] for row in members):
            budgets = list(dict.fromkeys(row["budget"] for row in members if row["policy"] == policy))
            points = [_mean(members, policy, budget) for budget in budgets]
            color, style = ("black", "-") if policy == "full" else STYLES.get(policy, ("tab:brown", "-"))
            marker = {"full": "s", "oracle": "^"}.get(policy, "o")
            axis.plot(*zip(*points, strict=True), style, color=color, marker=marker, ms=5, label=policy, alpha=0.8)
        tokens = np.mean([row["tokens"] for row in members])
        axis.set_title(f"{benchmark}, {tokens:,.0f} tokens", fontsize=9)
        axis.set_xlim(left=0)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.set_xlabel("resident KV cache, MB")
    axes[0][0].set_ylabel("accuracy, mean over tasks")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def answers_by_depth(rows: Rows) -> Figure | None:
    """Heat maps, one per policy at the smallest budget: accuracy of needle tasks by depth and length."""
    if not rows:
        return None
    least = min((row["budget"] for row in rows if row["budget"] is not None), default=None)
    rows = [row for row in rows if row["budget"] in (None, least)]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    depths = sorted({tuple(row["depth"]) for row in rows})
    lengths = sorted({row["length"] for row in rows})
    size = (1.8 + (0.9 + 0.55 * len(lengths)) * len(policies), 1.2 + 0.5 * len(depths))
    figure, axes = pyplot.subplots(1, len(policies), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, policy in zip(axes[0], policies, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for row in (row for row in rows if row["policy"] == policy):
            place = depths.index(tuple(row["depth"])), lengths.index(row["length"])
            grid[place] = row["accuracy"]
            axis.text(place[1], place[0], f"{row['accuracy']:.2f}\nn={row['examples']}", ha="center", va="center",
                      fontsize=7, color="white" if row["accuracy"] < 0.5 else "black")  # fmt: skip
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{low:.0%}-{high:.0%}" for low, high in depths], fontsize=8)
        axis.set_title(policy, fontsize=9)
    axes[0][0].set_ylabel("depth of the needle")
    figure.supxlabel("tokens", fontsize=9)
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    return figure


def _mean(rows: Rows, policy: str, budget: float | None) -> tuple[float, float]:
    """(MB, accuracy), means over tasks."""
    found = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
    return np.mean([row["kv_mb"] for row in found]), np.mean([row["accuracy"] for row in found])
