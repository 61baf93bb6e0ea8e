"""Draw the README's plot: answers and text beside the share of the KV cache that was kept, for every policy.

    python -m benchmarks.front_plot benchmarks/results/ablations-smollm2-h200.json

FILE is what `lookahead decode` or `benchmarks.ablations` wrote; of the latter the documents of the report count. Writes
docs/pictures/answers.svg, which reads on a light page and on a dark one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.ablation_tables import EVERY
from data_gen.core.files import write_atomically
from eval.online.summary import wilson
from eval.report.figures import finished

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "answers.svg"
STYLES = {
    "full attention": ("black", "s"),
    "indexer": ("tab:red", "o"),
    "oracle": ("black", "x"),
    "recency": ("tab:green", "o"),
    "mean-pooled keys": ("tab:blue", "o"),
    "random": ("tab:orange", "o"),
}
NAMES = {"full": "full attention", "recipe": "indexer", "mean_pooled": "mean-pooled keys", "oracle of peaks": "oracle"}
"""What the files call these."""
INK = "svg{fill: var(--ink); --ink: #1f2328} @media (prefers-color-scheme: dark){svg{--ink: #e6edf3}} "
"""The page's own black, in CSS."""


@dataclass(frozen=True)
class Point:
    """One policy. right of questions; kl: nats per token on `texts` texts; kept, kept_of_text: shares of the cache."""

    policy: str
    right: int
    questions: int
    kept: float
    kl: float | None
    texts: int
    kept_of_text: float


def points_of(data: dict[str, Any]) -> list[Point]:
    """The policies of a results.json, or of what the ablations wrote, that the plot shows."""
    found = _decoded(data["decode"]) if "decode" in data else _ablated(data["rows"])
    named = {point.policy: point for point in found}
    return [named[policy] for policy in STYLES if policy in named]


def _decoded(rows: Sequence[dict[str, Any]]) -> list[Point]:
    points = []
    for row in rows:
        kl = 0.0 if row["policy"] == "full" else row["kl"]
        share = row["kv_share"]
        name = NAMES.get(row["policy"], row["policy"])
        points.append(Point(name, row["correct"], row["examples"], share, kl, row["texts"], share))
    return points


def _ablated(rows: Sequence[dict[str, Any]]) -> list[Point]:
    points = []
    rows = [row for row in rows if row["set"] == "report"]
    policies: list[str] = [row["policy"] for row in rows]
    for policy in dict.fromkeys(policies):
        asked = [row for row in rows if row["policy"] == policy and "right" in row and row["task"] != EVERY]
        (text,) = (row for row in rows if row["policy"] == policy and "kl" in row)
        questions = sum(row["documents"] for row in asked)
        right = round(sum(row["right"] * row["documents"] for row in asked))
        kept = sum(row["kept"] * row["documents"] for row in asked) / questions
        name = NAMES.get(policy, policy)
        points.append(Point(name, right, questions, kept, text["kl"], text["documents"], text["kept"]))
    return points


def plot(points: Sequence[Point]) -> Figure:
    """Left: questions answered with 95 % intervals. Right: KL of the next token from full attention."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    answers, texts = figure.subplots(1, 2)
    for point in points:
        color, marker = STYLES[point.policy]
        share = point.right / point.questions
        low, high = wilson(point.right, point.questions)
        spread = [[100 * (share - low)], [100 * (high - share)]]
        look = {"fmt": marker, "color": color, "capsize": 3, "ms": 7, "label": point.policy}
        answers.errorbar(100 * point.kept, 100 * share, spread, **look)
        if point.kl is not None:
            texts.errorbar(100 * point.kept_of_text, point.kl, **look)
    answers.set_title(f"Answers: {points[0].questions} questions on far facts", fontsize=10)
    answers.set_ylabel("right, %")
    answers.set_ylim(-3, 103)
    texts.set_title(f"Text: {max(point.texts for point in points)} continued texts (lower is better)", fontsize=10)
    texts.set_ylabel("KL from full attention, nats a token")
    texts.set_ylim(bottom=0)
    for axis in (answers, texts):
        axis.set_xlim(0, 106)
        axis.set_xlabel("KV cache kept, %")
    return finished(figure, [answers, texts])


def drawn(figure: Figure) -> str:
    """The figure as SVG without a ground; what is black has the page's ink."""
    file, style = StringIO(), '<style type="text/css">'
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue().replace("#000000", "var(--ink)").replace(style, style + INK, 1)


def main() -> None:
    """Read a file and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    figure = plot(points_of(json.loads(args.file.read_bytes())))
    with rc_context({"svg.hashsalt": args.file.name}):  # the same picture from the same figures
        write_atomically(args.out, lambda file: file.write_text(drawn(figure), encoding="utf-8"))


if __name__ == "__main__":
    main()
