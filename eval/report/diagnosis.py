"""The report's pictures for diagnosis: what scores mean, how a threshold transfers, one document, refresh intervals.

As in figures.py: rows in, a figure out, None where nothing is to draw.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from eval.report.figures import finished
from eval.report.rows import DocumentRow, Lookahead, RefreshRow, ReliabilityRow, Timeline
from eval.report.tables import STYLES, cut_name

SHOWN = [policy for policy in STYLES if policy not in ("native", "protected")]
"""Policies that pictures of time show, in the order of the tables."""
KEPT, MISSED = "tab:green", "tab:red"


def reliability_curve(bins: Sequence[ReliabilityRow], probabilities: bool) -> Figure | None:
    """Chunks from the lowest scores to the highest: the golden share that was observed, and the sigmoid's where the
    scores were trained as `probabilities`."""
    if not bins:
        return None
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    axis = figure.subplots()
    ends = 100 * np.cumsum([each.chunks for each in bins]) / sum(each.chunks for each in bins)
    middles = (ends + np.concatenate([[0], ends[:-1]])) / 2
    axis.plot(middles, [100 * each.observed for each in bins], "o-", color="tab:red", ms=4, label="observed: golden")
    if probabilities:
        predicted = [100 * each.predicted for each in bins]
        axis.plot(middles, predicted, "s:", color="gray", ms=3, label="sigmoid of the score")
    axis.set_xlabel("chunks by score, percentile")
    axis.set_ylabel("share, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def threshold_transfer(documents: Sequence[DocumentRow], budget: float) -> Figure | None:
    """What the one calibrated threshold kept of each held-out document, and the recall it had there, by length."""
    if not documents:
        return None
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    plain = {row.task for row in documents if row.depth is None}
    for axis, metric in zip(axes, ("kept", "mass_recall"), strict=True):
        for label, color, chosen in (("needles", "tab:blue", False), (" and ".join(sorted(plain)), "tab:orange", True)):
            some = [row for row in documents if (row.depth is None) is chosen and getattr(row, metric) is not None]
            if some:
                shares = [100 * getattr(row, metric) for row in some]
                axis.scatter([row.length for row in some], shares, color=color, s=18, label=label)
        axis.set_xlabel("document length, tokens")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].axhline(100 * budget, ls="--", color="black", lw=1, label="budget")
    axes[0].set_ylabel("chunks kept by the threshold, %")
    axes[1].set_ylabel("mass recall at the threshold (document's mean), %")
    axes[0].legend(frameon=False)
    return figure


def refreshes(found: Lookahead) -> Figure | None:
    """Recall against refresh interval, and decay inside a window, of the group with the longest answers."""
    task = _longest(found.rows)
    if task is None:
        return None
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for policy in SHOWN:
        color, style = STYLES[policy]
        rows = [row for row in found.rows if (row.policy, row.task) == (policy, task)]
        rows = [row for row in rows if row.mass_recall is not None]
        if not rows:
            continue
        xs = [row.interval for row in rows]
        axes[0].plot(xs, [row.mass_recall for row in rows], style, color=color, marker="o", ms=3, label=policy)
        decay = [row for row in found.decay if (row.policy, row.task) == (policy, task)]
        decay = [row for row in decay if row.mass_recall is not None]
        axes[1].plot([row.offset for row in decay], [row.mass_recall for row in decay], style, color=color,
                     marker="o", ms=3)  # fmt: skip
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set_xlabel("tokens between refreshes")
    axes[0].set_ylabel(f"attention-mass recall, token-weighted ({task})")
    axes[1].set_xlabel("tokens since the refresh")
    axes[0].set_title("refresh interval")
    axes[1].set_title("decay inside a window")
    axes[0].set_ylim(0, 1)
    return finished(figure, axes)


def churn(found: Lookahead) -> Figure | None:
    """Share of the selected chunks that a refresh fetches, and the traffic that makes, against the interval."""
    rows = [row for row in found.rows if row.churn is not None]
    task = _longest(rows)
    if task is None:
        return None
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for policy in SHOWN:
        color, style = STYLES[policy]
        some = [row for row in rows if (row.policy, row.task) == (policy, task)]
        if not some:
            continue
        xs = [row.interval for row in some]
        axes[0].plot(
            xs,
            [100 * row.churn for row in some if row.churn is not None],
            style,
            color=color,
            marker="o",
            ms=3,
            label=policy,
        )
        moved = [
            (row.bytes_per_token or 0) / 1e3 or None for row in some
        ]  # recency moves nothing: no place on a log axis
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
    return finished(figure, axes)


def score_timeline(found: Timeline | None) -> Figure | None:
    """Tokens across, chunks upwards: grey the score's rank, blue what was kept, dots what tokens needed."""
    if found is None:
        return None
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    axis = figure.subplots()
    size, bins = found.bin_chunks, len(found.windows[0].ranks)
    for window in found.windows:
        left, right = window.first - 0.5, window.last + 0.5
        ranks = np.array(window.ranks, dtype=float)[:, None]
        axis.imshow(ranks, extent=(left, right, -0.5, bins * size - 0.5), origin="lower", aspect="auto", cmap="Greys",
                    vmin=0, vmax=160)  # fmt: skip
        axis.hlines([chunk for chunk in window.kept], left, right, color="tab:blue", lw=1.6, alpha=0.75)
        axis.hlines([edge - 0.5 for edge in window.candidates], left, right, color="black", lw=0.8, ls=":")
        axis.axvline(left, color="black", lw=0.6)
    for kept, color in ((1, KEPT), (0, MISSED)):
        dots = [(position, chunk) for position, chunk, inside in found.needed if inside == kept]
        if dots:
            axis.scatter(*zip(*dots, strict=True), s=7, color=color, lw=0, zorder=3)
    count = sum(inside for *_, inside in found.needed)
    axis.set_xlim(found.windows[0].first - 0.5, found.windows[-1].last + 0.5)
    axis.set_ylim(-0.5, found.windows[-1].candidates[1] + 8)
    axis.set_xlabel("token position (a refresh at every vertical line)")
    axis.set_ylabel(f"chunk of {found.chunk_tokens} tokens")
    axis.set_title(f"{count} of {len(found.needed)} needs were kept at {cut_name(found.budget)}", fontsize=10)
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


def _longest(rows: Sequence[RefreshRow]) -> str | None:
    """The group of tasks measured over the most refreshes."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.task] = counts.get(row.task, 0) + row.refreshes
    return max(counts, key=lambda task: counts[task], default=None)
