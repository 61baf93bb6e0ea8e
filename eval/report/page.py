"""The report: one HTML file with its pictures inside, no network, and a Markdown summary, made from results.json.

What a reader wants comes first: the setting, one sentence, answers and text beside the bytes that they took. Recall is
diagnosis and comes after. What the sections show is in sections.py, the page is page.html.j2.
"""

import base64
import io
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from data_gen.core.errors import InputError
from data_gen.core.files import RESULTS, write_atomically
from eval.report.rows import Results
from eval.report.sections import SECTIONS, Section
from eval.report.tables import GROUPS, decode_summary, number, read_results
from eval.report.tasks import average_rows, column_name

LONG = 12
"""Rows beyond which the page folds a table."""


@rc_context({"text.parse_math": False})  # a name with two dollars in it is no formula
def write_report(folder: Path) -> tuple[Path, Path]:
    """FOLDER/report.html and FOLDER/report.md from FOLDER/results.json: whatever sections are there.

    Raises InputError when there are no results or they are damaged.
    """
    results = read_results(folder)
    if not results.model_fields_set:
        raise InputError(f"{folder / RESULTS}: no results there; run `lookahead evaluate` first")
    sections = [section for make in SECTIONS if (section := make(results)) is not None]
    head, sentence = _head(results), _sentence(results)
    page, summary = folder / "report.html", folder / "report.md"
    html, markdown = _page(head, sentence, sections), _markdown(head, sentence, sections)
    write_atomically(page, lambda file: file.write_text(html, encoding="utf-8"))
    write_atomically(summary, lambda file: file.write_text(markdown, encoding="utf-8"))
    return page, summary


def _head(results: Results) -> dict[str, list[str]]:
    """The facts of the settings, each once where all verbs agree, else a line for each verb."""
    facts: dict[str, list[tuple[str, str]]] = {}
    for verb, setting in results.measured.items():
        chunking = setting.chunking
        told = {
            "model": setting.model,
            "recipe": setting.recipe or "none",
            "commit": setting.commit or "unknown",
            "hardware": setting.hardware or "unknown",
            "date": setting.date,
            "chunking": f"chunks of {chunking.tokens} tokens, the first {chunking.sink} and the newest "
            f"{chunking.recent} protected; refreshed every {setting.window} tokens"
            + (f", first after {setting.first_window}" if setting.first_window else ""),
            "documents": setting.documents,
        }
        for name, value in told.items():
            facts.setdefault(name, []).append((verb, value))
    return {
        name: [values[0][1]] if len({value for _, value in values}) == 1 else [f"{v}: {value}" for v, value in values]
        for name, values in facts.items()
    }


def _sentence(results: Results) -> str:
    """What was found, in one sentence: of answers where there are any, else of recall."""
    if results.decode:
        return decode_summary(results.decode)
    if results.benchmark:
        averages = average_rows(results.benchmark)
        full = next(mean for mean in averages if mean.policy == "full")
        said = [f"{column_name(mean)} {mean.percent} % with {mean.kv_share:.1%} of the KV bytes" for mean in averages
                if mean.policy == "indexer"]  # fmt: skip
        return f"Mean accuracy over the benchmark: full attention {full.percent} %; {'; '.join(said)}." if said else ""
    budget = results.evaluated.budget if results.evaluated else None
    rows = [row for row in results.recall or [] if row.task in GROUPS and row.budget == budget]
    found = [f"{row.policy} {number(row.mass_recall, row.documents)}" for row in rows if row.task == rows[0].task
             and (row.policy in ("oracle", "recency") or (row.indexer and row.layer is None))]  # fmt: skip
    return f"Attention mass found with {budget:.1%} kept, {rows[0].task}: {', '.join(found)}." if found else ""


def _page(head: dict[str, list[str]], sentence: str, sections: Iterable[Section]) -> str:
    """Whatever the results say is escaped: names of documents and tasks are not ours."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("eval.report") / "page.html.j2").read_text(encoding="utf-8"))
    shown = [
        (section, {name: _data_uri(picture) for name, picture in section.pictures.items() if picture is not None})
        for section in sections
    ]
    return template.render(head=head, sentence=sentence, sections=shown, long=LONG) + "\n"


def _data_uri(picture: Figure) -> str:
    """The figure as an SVG that needs nothing from outside."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _markdown(head: dict[str, list[str]], sentence: str, sections: Iterable[Section]) -> str:
    parts = ["# Lookahead report", *([sentence] if sentence else []), "Pictures: report.html"]
    if head:
        parts.append("\n".join(f"- {name}: {'; '.join(values)}" for name, values in head.items()))
    for section in sections:
        parts += [f"## {section.title}", section.text]
        for caption, table in section.tables.items():
            parts += ([f"**{caption}**"] if caption else []) + [str(table)]
    return "\n\n".join(parts) + "\n"
