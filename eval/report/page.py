"""The report: one HTML file with its pictures inside, no network, and a Markdown summary, made from results.json."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from eval.report import figures, figures_tasks, figures_time
from eval.report.tables import (
    RESULTS,
    STYLES,
    comparison_table,
    cut_name,
    decode_summary,
    decode_table,
    read_results,
    recall_table,
    table,
)
from eval.report.tasks import benchmark_table, difference_table, fidelity_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #555; max-width: 50rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { border-bottom: 2px solid #999; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
"""


def write_report(folder: Path) -> tuple[Path, Path]:
    """FOLDER/report.html and FOLDER/report.md from FOLDER/results.json: whatever sections are there.

    Raises InputError when there are no results or they are damaged.
    """
    results = read_results(folder).content()
    if not results:
        raise InputError(f"{folder / RESULTS}: no results there; run `lookahead evaluate` first")
    sections = [section for make in SECTIONS if (section := make(results)) is not None]
    page, summary = folder / "report.html", folder / "report.md"
    write_atomically(page, lambda file: file.write_text(_page(sections), encoding="utf-8"))
    write_atomically(summary, lambda file: file.write_text(_summary(sections), encoding="utf-8"))
    return page, summary


RECALLS = ("mass_recall", "golden_recall")
Section = tuple[str, str, list[tuple[str, Figure]], str]
"""(title, what it says, pictures with their names, a Markdown table or "")."""


def _recall(results: dict[str, Any]) -> Section | None:
    if "recall" not in results:
        return None
    text = (
        "Every chunk is scored; every policy gets the same budget on top of the same protected chunks, which count for "
        "nobody. Macro averages over documents; bands are 95 % bootstrap intervals over documents. The oracle is a "
        "bound, for each metric its own. 'exact_attention' is what the backbone attended to at the window's first "
        "token, 'native_votes' how many of its own indexers picked a chunk there, 'frequency' the chunks golden most "
        "often so far: all of them see full attention, which sparse serving would not have."
    )
    curves = figures.recall_curves(results["recall"])
    return "Recall against budget", text, _named(("recall", curves)), recall_table(results["recall"])


def _metrics(results: dict[str, Any]) -> Section | None:
    """Every metric at the budget and at the threshold, macro with its interval, and micro."""
    budget = results.get("evaluated", {}).get("budget")
    shown = [row for row in results.get("recall", []) if row["budget"] in (budget, "threshold")]
    groups = [group for group in ("needles", "text", "document", "chat") if any(r["task"] == group for r in shown)]
    lines = []
    for group in groups:
        for row in (row for row in shown if row["task"] == group):
            values = [
                f"{_number(row[name])} {_bounds(row['interval'][name])}" for name in ("mass_recall", "golden_recall")
            ]
            micro = [row["micro"][name] for name in (*RECALLS, "precision", "f1")]
            macro = [row[name] for name in ("precision", "f1", "kept", "resident_mass")]
            lines.append([group, row["policy"], cut_name(row["budget"]), *values, *macro, *micro])
    if not lines:
        return None
    names = ["mass recall", "golden recall", "precision", "F1"]
    header = ["task", "policy", "cut", *(f"macro {name}" for name in [*names, "kept", "resident mass"])]
    header += [f"micro {name}" for name in names]
    text = (
        "Macro averages with 95 % intervals over documents, then micro averages: windows added up before dividing. "
        "'layer L' is one of the indexer's layers on its own, at the threshold of the joined score. 'resident mass' is "
        "the share of all attention that is not on evicted chunks: there, and only there, protected chunks count."
    )
    return "Every metric at the budget and at the threshold", text, [], table(header, lines)


def _tops(results: dict[str, Any]) -> Section | None:
    """recall@K of the indexers, of their layers and of what bounds them."""
    rows = [row for row in results.get("recall", []) if str(row["budget"]).startswith("top ")]
    cuts = list(dict.fromkeys(row["budget"] for row in rows))
    if not cuts:
        return None
    text = "Share of the golden chunks among the K best candidates, macro averages over documents."
    header = ["task", "policy", *(f"@{cut.removeprefix('top ')}" for cut in cuts)]
    return "Recall@K of golden chunks (macro)", text, [], table(header, _spread(rows, cuts))


def _places(results: dict[str, Any]) -> Section | None:
    """Mass recall by the length of the document and by the depth of the needle."""
    budget = results.get("evaluated", {}).get("budget")
    found = [("length", results.get("by_length", [])), ("depth", results.get("by_depth", []))]
    lines = []
    for what, rows in found:
        some = [row for row in rows if row["budget"] == budget and row["policy"] in STYLES]
        for row in some:
            recalls = [f"{_number(row[name])} {_bounds(row['interval'][name])}" for name in RECALLS]
            lines.append([what, row["task"], row["policy"], *recalls, row["documents"]])
    if not lines:
        return None
    text = f"At {budget:.1%} kept; lengths in tokens, depths of the needle from the start of the document."
    header = ["by", "bin", "policy", "macro mass recall", "macro golden recall", "documents"]
    return "Recall by length and depth", text, [], table(header, lines)


def _spread(rows: list[dict[str, Any]], cuts: list[str]) -> list[list[Any]]:
    """A line per task and policy, a column per cut: golden recall."""
    cells = {(row["task"], row["policy"], row["budget"]): row["golden_recall"] for row in rows}
    places = dict.fromkeys((row["task"], row["policy"]) for row in rows)
    return [[*place, *(cells.get((*place, cut)) for cut in cuts)] for place in places]


def _comparison(results: dict[str, Any]) -> Section | None:
    if not results.get("comparison"):
        return None
    one, other = results["evaluated"]["thresholds"]
    text = "The same documents for both; the 95 % interval is a paired bootstrap of the per-document differences."
    return f"{one} beside {other}", text, [], comparison_table(results["comparison"], one, other)


def _decode(results: dict[str, Any]) -> Section | None:
    rows = results.get("decode")
    if not rows:
        return None
    picture = figures.accuracy_against_bytes(rows)
    return "Accuracy against KV bytes", decode_summary(rows), _named(("accuracy", picture)), decode_table(rows)


def _benchmark(results: dict[str, Any]) -> Section | None:
    rows = results.get("benchmark")
    if not rows:
        return None
    pictures = _named(
        ("benchmark", figures_tasks.accuracy_by_bytes(rows)),
        ("depth", figures_tasks.answers_by_depth(results.get("benchmark_depth", []))),
    )
    text = (
        "Answers from one prefill, a column per policy and budget; every policy has the same protected chunks on top. "
        "KV: keys and values of the full-attention layers that are resident while answering. Intervals: Wilson where "
        "an answer is right or wrong, bootstrap over examples where it is scored in between. 'mrcr' is dense demand, "
        "where sparse attention is known to fail. The oracle knows what full attention's own answer attended to. "
        "Share of full: of the average accuracy, and the mean of each line's share of the bytes."
    )
    return "Benchmark: accuracy against KV bytes", text, pictures, benchmark_table(rows)


def _beside_full(results: dict[str, Any]) -> Section | None:
    rows = results.get("benchmark")
    if not rows:
        return None
    text = (
        "Accuracy less full attention's on the same examples, in points, with the bootstrap interval of the pairs, and "
        "the share of the tokens that was resident. 'frequency' has no row: counting golden chunks takes the attention "
        "of every token of the prompt, which one prefill does not give."
    )
    return "Benchmark: beside full attention", text, [], difference_table(rows)


def _benchmark_text(results: dict[str, Any]) -> Section | None:
    if not results.get("benchmark_text"):
        return None
    text = "Held-out text read on under each policy, one token at a time; intervals are bootstraps over texts."
    return "Benchmark: fidelity of plain text", text, [], fidelity_table(results["benchmark_text"])


def _calibration(results: dict[str, Any]) -> Section | None:
    if "documents" not in results:
        return None
    first, *_ = results["evaluated"]["thresholds"].values()
    budget = results["evaluated"]["budget"]
    pictures = _named(
        ("reliability", figures.reliability_curve(results.get("reliability", []))),
        ("threshold", figures.threshold_transfer(results["documents"], budget)),
    )
    text = (
        f"Of {_first(results)}. First: chunks in bins of equal counts, from the lowest scores to the highest; a "
        "calibrated probability would lie on the observed share. Listwise losses train an order, not probabilities. "
        f"Then: what the one calibrated threshold ({first}) kept of each held-out document; the line is the budget of "
        "the other figures."
    )
    return "Calibration", text, pictures, ""


def _depth(results: dict[str, Any]) -> Section | None:
    picture = figures.depth_by_length(results.get("heat", []), results.get("evaluated", {}).get("bins", ([], [])))
    if picture is None:
        return None
    budget = results["evaluated"]["budget"]
    text = f"Of {_first(results)}, at {budget:.0%} kept; n: documents of a cell. Few of them mean little."
    return "Needle depth and document length", text, [("heat", picture)], ""


def _time(results: dict[str, Any]) -> Section | None:
    found = results.get("lookahead")
    if not found:
        return None
    pictures = _named(("lookahead", figures_time.refreshes(found)), ("churn", figures_time.churn(found)))
    text = (
        "The same budget, refreshed more or less often. What arrives after a refresh stays resident until the next, so "
        "recall is over the chunks that were there at the refresh: compare with the oracle at the same interval. Churn "
        "counts selected chunks that were not resident before; recency only keeps what already is."
    )
    return "Lookahead and churn", text, pictures, ""


def _timeline(results: dict[str, Any]) -> Section | None:
    picture = figures_time.score_timeline(results.get("timeline"))
    if picture is None:
        return None
    text = f"Of {_first(results)}. Each dot is a chunk that a token attended to (golden), outside the protected ones."
    return "One document, token by token", text, [("timeline", picture)], ""


SECTIONS: list[Callable[[dict[str, Any]], Section | None]] = [
    _recall, _decode, _benchmark, _beside_full, _benchmark_text, _comparison, _metrics, _tops, _places, _calibration,
    _depth, _timeline, _time,
]  # fmt: skip


def _first(results: dict[str, Any]) -> str:
    """The indexer that the sections of one are about: of two, the first."""
    first, *others = results["evaluated"]["thresholds"]
    return f"indexer {first} (not {others[0]})" if others else "the indexer"


def _named(*pictures: tuple[str, Figure | None]) -> list[tuple[str, Figure]]:
    return [(name, picture) for name, picture in pictures if picture is not None]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bounds(interval: list[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _page(sections: list[Section]) -> str:
    parts = []
    for title, text, pictures, rows in sections:
        parts.append(f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(text)}</p>")
        for name, picture in pictures:
            parts.append(f'<figure id="{name}"><img alt="{name}" src="{_data_uri(picture)}"></figure>')
        parts.append(_html_table(rows) if rows else "")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Lookahead report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>Lookahead report</h1>\n{body}\n</body></html>\n"
    )


def _data_uri(picture: Figure) -> str:
    """The figure as an SVG that needs nothing from outside, closed afterwards."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(picture)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _html_table(markdown: str) -> str:
    """Our own Markdown tables (eval/report/tables.py) as HTML."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines()]
    cells = [[html.escape(cell.strip()) for cell in row] for row in (rows[0], *rows[2:])]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:])
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _summary(sections: list[Section]) -> str:
    parts = ["# Lookahead report\n\nPictures: report.html"]
    for title, text, _, rows in sections:
        parts.append(f"## {title}\n\n{text}" + (f"\n\n{rows}" if rows else ""))
    return "\n\n".join(parts) + "\n"
