"""The report's pictures of time: refresh intervals, decay, churn, and one document's timeline."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval.report.tables import STYLES

SHOWN = [policy for policy in STYLES if policy not in ("native", "protected")]
KEPT, MISSED = "tab:green", "tab:red"


def refreshes(found: dict[str, Any]) -> Figure | None:
    """Recall against refresh interval, and decay inside a window, of the group with the longest answers."""
    task = _longest(found["rows"])
    if task is None:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for policy in SHOWN:
        color, style = STYLES[policy]
        rows = [row for row in found["rows"] if (row["policy"], row["task"]) == (policy, task)]
        rows = [row for row in rows if row["mass_recall"] is not None]
        if not rows:
            continue
        xs = [row["interval"] for row in rows]
        axes[0].plot(xs, [row["mass_recall"] for row in rows], style, color=color, marker="o", ms=3, label=policy)
        decay = [row for row in found["decay"] if (row["policy"], row["task"]) == (policy, task)]
        decay = [row for row in decay if row["mass_recall"] is not None]
        axes[1].plot([row["offset"] for row in decay], [row["mass_recall"] for row in decay], style, color=color,
                     marker="o", ms=3)  # fmt: skip
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set_xlabel("tokens between refreshes")
    axes[0].set_ylabel(f"attention-mass recall, token-weighted ({task})")
    axes[1].set_xlabel("tokens since the refresh")
    axes[0].set_title("refresh interval")
    axes[1].set_title("decay inside a window")
    axes[0].set_ylim(0, 1)
    return _done(figure, axes)


def churn(found: dict[str, Any]) -> Figure | None:
    """Share of the selected chunks that a refresh fetches, and the traffic that makes, against the interval."""
    rows = [row for row in found["rows"] if row["churn"] is not None]
    task = _longest(rows)
    if task is None:
        return None
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for policy in SHOWN:
        color, style = STYLES[policy]
        some = [row for row in rows if (row["policy"], row["task"]) == (policy, task)]
        if not some:
            continue
        xs = [row["interval"] for row in some]
        axes[0].plot(xs, [100 * row["churn"] for row in some], style, color=color, marker="o", ms=3, label=policy)
        moved = [row["bytes_per_token"] / 1e3 or None for row in some]  # recency moves nothing: no place on a log axis
        axes[1].plot(xs, moved, style, color=color, marker="o", ms=3)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("tokens between refreshes")
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[0].set_ylabel(f"selected chunks fetched, % ({task})")
    axes[1].set_ylabel("kB fetched per decoded token")
    axes[0].set_title("churn per refresh")
    axes[1].set_title("traffic")
    return _done(figure, axes)


def score_timeline(found: dict[str, Any] | None) -> Figure | None:
    """Tokens across, chunks upwards: grey the score's rank, framed what was kept, dots what tokens needed."""
    if found is None:
        return None
    figure, axis = pyplot.subplots(figsize=(10.5, 5), layout="constrained")
    size, bins = found["bin_chunks"], len(found["windows"][0]["ranks"])
    for window in found["windows"]:
        left, right = window["first"] - 0.5, window["last"] + 0.5
        ranks = np.array(window["ranks"], dtype=float)[:, None]
        axis.imshow(ranks, extent=(left, right, -0.5, bins * size - 0.5), origin="lower", aspect="auto", cmap="Greys",
                    vmin=0, vmax=160)  # fmt: skip
        axis.hlines([chunk for chunk in window["kept"]], left, right, color="tab:blue", lw=1.6, alpha=0.75)
        axis.hlines([edge - 0.5 for edge in window["candidates"]], left, right, color="black", lw=0.8, ls=":")
        axis.axvline(left, color="black", lw=0.6)
    for kept, color in ((1, KEPT), (0, MISSED)):
        dots = [(position, chunk) for position, chunk, inside in found["needed"] if inside == kept]
        if dots:
            axis.scatter(*zip(*dots, strict=True), s=7, color=color, lw=0, zorder=3)
    count = sum(inside for *_, inside in found["needed"])
    axis.set_xlim(found["windows"][0]["first"] - 0.5, found["windows"][-1]["last"] + 0.5)
    axis.set_ylim(-0.5, found["windows"][-1]["candidates"][1] + 8)
    axis.set_xlabel("token position (a refresh at every vertical line)")
    axis.set_ylabel(f"chunk of {found['chunk_tokens']} tokens")
    axis.set_title(f"{found['document']} ({found['task']}): {count} of {len(found['needed'])} needs were kept at "
                   f"{found['budget']:.0%}", fontsize=10)  # fmt: skip
    dot = {"marker": "o", "ls": "", "ms": 4}
    legend = [
        Line2D([], [], color="tab:blue", lw=2, label="kept"),
        Line2D([], [], color=KEPT, label="needed and kept", **dot),
        Line2D([], [], color=MISSED, label="needed, missed", **dot),
        Patch(color="0.5", label="high score"),
        Line2D([], [], color="black", lw=0.8, ls=":", label="protected beyond"),
    ]
    axis.legend(handles=legend, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _longest(rows: list[dict[str, Any]]) -> str | None:
    """The group of tasks measured over the most refreshes."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["task"]] = counts.get(row["task"], 0) + row["refreshes"]
    return max(counts, key=lambda task: counts[task], default=None)


def _done(figure: Figure, axes: np.ndarray) -> Figure:
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
