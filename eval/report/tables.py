"""Results on disk and as tables: what Markdown, the terminal and the page show of results.json."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.core.errors import InputError
from data_gen.core.files import RESULTS, sweep, whole, write_atomically
from eval.report.rows import ComparisonRow, DecodeRow, RecallRow, Results

STYLES = {"oracle": ("black", "--"), "indexer": ("tab:red", "-"), "A": ("tab:red", "-"), "B": ("tab:cyan", "-"),
          "indexer+correction": ("tab:pink", "-"), "indexer+fallback": ("tab:olive", "-"),
          "indexer+coverage": ("tab:brown", "-"),
          "native": ("tab:purple", "-"), "exact_attention": ("tab:purple", "-"), "native_votes": ("tab:purple", "-"),
          "mean_pooled": ("tab:blue", "-"), "frequency": ("tab:orange", "-"), "recency": ("tab:green", "-"),
          "random": ("tab:gray", ":"), "protected": ("tab:gray", "-.")}  # fmt: skip
"""Line colour and style of each policy, in the order of the tables."""
GROUPS = ("needles", "text", "document", "chat")
"""Groups of tasks that together hold every document once, in the order of the tables."""
FEW = 20
"""Below so many documents or examples a third decimal says nothing."""


def read_results(folder: Path) -> Results:
    """FOLDER/results.json, empty where there is none. Raises InputError when it is damaged, or FOLDER is a file."""
    path = folder / RESULTS
    if next(each for each in (folder, *folder.absolute().parents) if each.exists()).is_file():
        raise InputError(f"{folder}: a file stands where that folder is to be; name another folder")
    if not path.exists():
        return Results()
    with whole(path, "results", "repair it, or delete it and measure again"):
        return Results.model_validate(json.loads(path.read_bytes()))


def write_results(folder: Path, **sections: Any) -> Results:
    """Merge `sections` (rows of eval/report/rows.py) into FOLDER/results.json, keeping the ones written earlier.

    Returns the whole. Raises InputError when the file there is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    results = read_results(folder).with_sections(**sections)
    text = json.dumps(results.content(), indent=1)
    write_atomically(folder / RESULTS, lambda file: file.write_text(text))
    return results


@dataclass(frozen=True)
class Table:
    """A table for Markdown (`str`) and for the page; floats with three decimals, None as a dash."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[_text(value) for value in row] for row in self.rows]

    @property
    def words(self) -> list[bool]:
        """Which columns hold names rather than figures."""
        return [any(cell[:1].isalpha() for cell in column) for column in zip(*self.cells, strict=True)]

    def __str__(self) -> str:
        lines = [list(self.header), *self.cells]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        rendered = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
                    for line in lines]  # fmt: skip
        rendered.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(rendered)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def number(value: float | None, count: int) -> str:
    """A figure that `count` documents or examples stand behind: two decimals of fewer than FEW, else three."""
    return "-" if value is None else f"{value:.{2 if count < FEW else 3}f}"


def bounds(interval: Sequence[float | None] | None, count: int) -> str:
    """ " [low, high]" with the decimals of `number`; empty where there is no interval."""
    if interval is None or None in interval:
        return ""
    low, high = (number(bound, count) for bound in interval)
    return f" [{low}, {high}]"


def cut_name(cut: float | str) -> str:
    """A share as a percentage, "threshold", "coverage" and "top K" as they are."""
    return cut if isinstance(cut, str) else f"{cut:.1%}"


def depth_name(depth: tuple[float, float]) -> str:
    """A bin of depths, as `Evaluated.bins` names it."""
    return f"{depth[0]:.0%}-{depth[1]:.0%}"


def length_name(length: tuple[int, int]) -> str:
    """A bin of lengths, as `Evaluated.bins` names it."""
    return f"{length[0]:,}-{length[1]:,}" if length[0] < length[1] else f"{length[0]:,}"


def policy_order(policy: str) -> tuple[int, str]:
    """Sorts policies as STYLES does, then layers of indexers."""
    names = list(STYLES)
    return (names.index(policy) if policy in names else len(names)), policy


def recall_table(rows: Iterable[RecallRow]) -> Table:
    """Mass recall and golden recall (macro) by policy, a column pair per budget, for each group of tasks."""
    lines = []
    rows = [row for row in rows if row.policy in STYLES]
    budgets = sorted({row.budget for row in rows if isinstance(row.budget, float)})
    cells = {(row.task, row.policy, row.budget): row for row in rows}
    order = sorted(rows, key=lambda row: (row.task != "needles", row.task, policy_order(row.policy)))
    for task, policy in dict.fromkeys((row.task, row.policy) for row in order):
        found = [cells[task, policy, budget] for budget in budgets]
        values = [f"{number(r.mass_recall, r.documents)} / {number(r.golden_recall, r.documents)}" for r in found]
        lines.append([task, policy, *values, found[0].documents])
    header = ["mass / golden recall (macro)", "kept:", *[f"{budget:.1%}" for budget in budgets], "documents"]
    return Table(header, lines)


def comparison_table(rows: Iterable[ComparisonRow]) -> Table:
    """Two indexers at every budget and as calibrated: macro averages, the paired difference and its interval."""
    lines = []
    for row in rows:
        if row.top is None:
            few = 2 if row.documents < FEW else 3
            interval = "" if row.low is None else f" [{row.low:+.{few}f}, {row.high:+.{few}f}]"
            averages = [number(value, row.documents) for value in (row.A, row.B)]
            lines.append([row.task, row.metric, cut_name(row.budget), *averages,
                          f"{row.difference:+.{few}f}{interval}", row.documents])  # fmt: skip
    return Table(["task", "metric (macro)", "cut", "A", "B", "A - B, 95 % interval", "documents"], lines)


def calibrated_lines(results: Results) -> list[str]:
    """What each indexer's threshold, and its coverage if it has one, kept of every group of tasks, and both recalls."""
    if results.evaluated is None:
        return []
    lines = []
    rules = {"threshold": results.evaluated.thresholds, "coverage": results.evaluated.coverages}
    for row in results.recall or []:
        rule = rules.get(str(row.budget), {}).get(row.policy)
        if rule is not None:
            who = row.budget if row.policy == "indexer" else f"{row.budget} of {row.policy}"
            mass, golden = (number(value, row.documents) for value in (row.mass_recall, row.golden_recall))
            lines.append(f"{who}, {row.task}: {rule}: kept {row.kept:.1%}, "
                         f"macro mass recall {mass}, golden recall {golden}")  # fmt: skip
    return lines


def decode_table(rows: Iterable[DecodeRow]) -> Table:
    """The decode check, a line per policy."""
    rows = list(rows)
    counted = any(row.fetched is not None for row in rows)
    header = ["policy", "needles right", "95 % interval", "text KL", "text agreement", "chunks", "KV share", "KV MB"]
    lines = [
        [
            row.policy,
            f"{row.correct} of {row.examples}" if row.examples else None,
            f"{row.low:.2f}-{row.high:.2f}" if row.examples else None,
            number(row.kl, row.texts),
            number(row.agreement, row.texts),
            f"{row.chunks:.1f}",
            f"{row.kv_share:.1%}",
            f"{row.kv_mb:.1f}",
            *(number(value, row.examples + row.texts) for value in (row.fetched, row.mean_key_mb) if counted),
        ]
        for row in rows
    ]
    return Table(header + (["chunks fetched a token", "mean keys MB"] if counted else []), lines)


def decode_summary(rows: Sequence[DecodeRow]) -> str:
    """One plain sentence: what was kept and what it cost."""
    full, kept = (next(row for row in rows if row.policy == name) for name in ("full", "indexer"))
    said = []
    if kept.examples:
        answered = f"the model answered {kept.correct} of {kept.examples} needle questions"
        said.append(f"{answered}; with all of it, {full.correct}")
    if kept.agreement is not None:
        said.append(f"its next token on text agreed with full attention's {kept.agreement:.0%} of the time")
    resident = f"{kept.kv_share:.0%} of the KV cache resident ({kept.kv_mb:.1f} of {full.kv_mb:.1f} MB)"
    return f"With {resident}, {'; '.join(said)}."
