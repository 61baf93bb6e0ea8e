"""Results on disk and on the terminal: results.json, a plot, and tables."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from data_gen.core.files import whole, write_atomically
from eval.report.rows import Results

RESULTS = "results.json"
"""What evaluate, decode and benchmark add to."""
STYLES = {"oracle": ("black", "--"), "indexer": ("tab:red", "-"), "A": ("tab:red", "-"), "B": ("tab:cyan", "-"),
          "native": ("tab:purple", "-"), "exact_attention": ("tab:purple", "-"), "native_votes": ("tab:purple", "-"),
          "mean_pooled": ("tab:blue", "-"), "frequency": ("tab:orange", "-"), "recency": ("tab:green", "-"),
          "random": ("tab:gray", ":"), "protected": ("tab:gray", "-.")}  # fmt: skip
"""Line colour and style of each policy."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns; floats with three decimals, None as a dash."""

    def text(value: Any) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [list(header), *[[text(value) for value in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
                for line in lines]  # fmt: skip
    rendered.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rendered)


def recall_table(rows: list[dict[str, Any]]) -> str:
    """Mass recall and golden recall (macro) by policy, a column pair per budget, for each group of tasks."""
    lines = []
    rows = [row for row in rows if row["policy"] in STYLES]
    budgets = sorted({row["budget"] for row in rows if isinstance(row["budget"], float)})
    cells = {(row["task"], row["policy"], row["budget"]): row for row in rows}
    for task, policy in dict.fromkeys((row["task"], row["policy"]) for row in sorted(rows, key=_order)):
        found = [cells[task, policy, budget] for budget in budgets]
        values = [f"{row['mass_recall']:.3f} / {_share(row['golden_recall'])}" for row in found]
        lines.append([task, policy, *values, found[0]["documents"]])
    header = ["mass / golden recall (macro)", "kept:", *[f"{budget:.1%}" for budget in budgets], "documents"]
    return table(header, lines)


def comparison_table(rows: list[dict[str, Any]], one: str, other: str) -> str:
    """Two indexers at every budget and at their thresholds: macro averages, the paired difference and its interval."""
    lines = []
    for row in rows:
        if not str(row["budget"]).startswith("top"):
            interval = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
            lines.append([row["task"], row["metric"], cut_name(row["budget"]), row[one], row[other],
                          f"{row['difference']:+.3f}{interval}", row["documents"]])  # fmt: skip
    return table(["task", "metric (macro)", "cut", one, other, f"{one} - {other}, 95 % interval", "documents"], lines)


def cut_name(cut: float | str) -> str:
    """A share as a percentage, "threshold" and "top K" as they are."""
    return cut if isinstance(cut, str) else f"{cut:.1%}"


def threshold_lines(found: dict[str, Any]) -> list[str]:
    """What each indexer's threshold kept of every group of tasks, and both recalls it had."""
    lines, thresholds = [], found["evaluated"]["thresholds"]
    for row in found["recall"]:
        if row["budget"] == "threshold" and row["policy"] in thresholds:
            who = "threshold" if row["policy"] == "indexer" else f"threshold of {row['policy']}"
            recall = f"macro mass recall {_share(row['mass_recall'])}, golden recall {_share(row['golden_recall'])}"
            lines.append(f"{who}, {row['task']}: {thresholds[row['policy']]}: kept {row['kept']:.1%}, {recall}")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _order(row: dict[str, Any]) -> tuple:
    return (row["task"] != "needles", row["task"], list(STYLES).index(row["policy"]))


def plot_recall(rows: list[dict[str, Any]], path: Path) -> None:
    """Mass recall (top) and golden recall (bottom) against the budget, a column per task group; PNG."""
    rows = [row for row in rows if row["policy"] in STYLES]
    tasks = list(dict.fromkeys(row["task"] for row in sorted(rows, key=_order)))
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(3.4 * len(tasks), 6.2), sharex=True, squeeze=False)
    for column, task in enumerate(tasks):
        for line, metric in enumerate(("mass_recall", "golden_recall")):
            axis = axes[line][column]
            for policy, (color, style) in STYLES.items():
                points = [row for row in rows if (row["task"], row["policy"]) == (task, policy)]
                points = [row for row in points if isinstance(row["budget"], float) and row[metric] is not None]
                if not points:
                    continue
                xs = [100 * row["budget"] for row in points]
                axis.plot(xs, [row[metric] for row in points], style, color=color, marker="o", ms=3, label=policy)
            axis.set_ylim(0, 1)
            axis.grid(alpha=0.3)
            axis.set_title(f"{task}: {points[0]['documents'] if points else 0} documents" if line == 0 else "")
            if column == 0:
                axis.set_ylabel(f"{('attention-mass', 'golden-chunk')[line]} recall (macro)")
            if line == 1:
                axis.set_xlabel("chunks kept, % (protected apart)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    pyplot.close(figure)


def read_results(folder: Path) -> Results:
    """FOLDER/results.json, empty where there is no such file. Raises InputError when it is damaged."""
    path = folder / RESULTS
    if not path.exists():
        return Results()
    with whole(path, "results", "repair it, or delete it and measure again"):
        return Results.model_validate(json.loads(path.read_bytes()))


def write_results(folder: Path, **sections: Any) -> Results:
    """Merge `sections` (rows of eval/report/rows.py) into FOLDER/results.json, keeping the ones written earlier.

    Returns the whole. Raises InputError when the file there is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = read_results(folder).with_sections(**{name: _typed(name, rows) for name, rows in sections.items()})
    text = json.dumps(results.content(), indent=1)
    write_atomically(folder / RESULTS, lambda file: file.write_text(text))
    return results


def _typed(section: str, rows: Any) -> Any:
    """Rows that are dicts still, with the fields that their names are made of; to go with the last such rows."""
    if section not in ("recall", "by_length", "by_depth", "heat", "comparison") or not rows:
        return rows
    return [_with_fields(section, row) if isinstance(row, dict) else row for row in rows]


def _with_fields(section: str, row: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if str(row["budget"]).startswith("top "):
        more["top"] = int(row["budget"].split()[1])
    if layer := re.fullmatch(r"(?:(.+) )?layer (\d+)", row.get("policy", "")):
        more |= {"indexer": layer[1] or "indexer", "layer": int(layer[2])}
    elif row.get("policy") in ("indexer", "A", "B"):
        more["indexer"] = row["policy"]
    places = dict(zip(("depth", "length"), row["task"].split(" | "), strict=True)) if section == "heat" else {}
    places |= {section.removeprefix("by_"): row["task"]} if section.startswith("by_") else {}
    if "length" in places:
        ends = [int(end.replace(",", "")) for end in places["length"].split("-")]
        more["length"] = (ends[0], ends[-1])
    if "depth" in places:
        more["depth"] = tuple(int(end.rstrip("%")) / 100 for end in places["depth"].split("-"))
    return row | more


def decode_table(rows: list[dict[str, Any]]) -> str:
    """The decode check, a line per policy."""
    header = ["policy", "needles right", "95 % interval", "text agreement", "text KL", "chunks", "KV share", "KV MB"]
    lines = [
        [
            row["policy"],
            f"{row['correct']} of {row['examples']}" if row["examples"] else None,
            f"{row['low']:.2f}-{row['high']:.2f}" if row["examples"] else None,
            row["agreement"],
            row["kl"],
            f"{row['chunks']:.1f}",
            f"{row['kv_share']:.1%}",
            f"{row['kv_mb']:.1f}",
        ]
        for row in rows
    ]
    return table(header, lines)


def decode_summary(rows: list[dict[str, Any]]) -> str:
    """One plain sentence: what was kept and what it cost."""
    full, kept = (next(row for row in rows if row["policy"] == name) for name in ("full", "indexer"))
    said = []
    if kept["examples"]:
        answered = f"the model answered {kept['correct']} of {kept['examples']} needle questions"
        said.append(f"{answered}; with all of it, {full['correct']}")
    if kept["agreement"] is not None:
        said.append(f"its next token on text agreed with full attention's {kept['agreement']:.0%} of the time")
    resident = f"{kept['kv_share']:.0%} of the KV cache resident ({kept['kv_mb']:.1f} of {full['kv_mb']:.1f} MB)"
    return f"With {resident}, {'; '.join(said)}."
