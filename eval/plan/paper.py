"""The paper's efficiency figures for V4-Flash beside ours, term by term (arXiv 2606.09079)."""

from typing import Any

from eval.plan.plan import Plan
from eval.plan.settings import PlanSettings
from eval.report.tables import table

PAPER_MODEL = "deepseek-v4-flash"
PAPER = {
    262144: {"kv_gb_full": 0.94, "gflop_full_paper": 50.8, "gflop_lsa_paper": 28.8},
    524288: {"kv_gb_full": 1.87, "gflop_full_paper": 73.5, "gflop_lsa_paper": 31.0},
    1048576: {"kv_gb_full": 3.73, "gflop_full_paper": 118.9, "gflop_lsa_paper": 35.4},
}
"""Context -> what the paper states. GiB; GFLOP of the whole model per decoded token."""
LABELS = {"kv_gb_full": "KV full, GiB", "gflop_full_paper": "GFLOP full, its terms",
          "gflop_lsa_paper": "GFLOP LSA, its terms"}  # fmt: skip
SHARED = ("kept", "window", "indexer_layers", "heads", "rank")
"""Settings that must be the paper's for its figures to be comparable."""


def _comparable(plan: Plan) -> bool:
    default = PlanSettings()
    same = all(getattr(plan.settings, name) == getattr(default, name) for name in SHARED)
    return same and plan.model.name == PAPER_MODEL


def paper_points(plan: Plan, quantity: str, side: str) -> list[tuple[int, float]]:
    """(context, figure) that the paper states of `kv_gb` or `gflop`, side `full` or `lsa`, where comparable."""
    keys = (f"{quantity}_{side}", f"{quantity}_{side}_paper")
    found = [(context, stated[key]) for context, stated in PAPER.items() for key in keys if key in stated]
    return found if _comparable(plan) else []


def beside_paper(plan: Plan) -> list[str]:
    """Paragraphs that reconcile a plan with the paper; none for another model, other settings or other contexts."""
    rows = [row for row in plan.rows if row["context"] in PAPER]
    if not rows or not _comparable(plan):
        return []
    return [
        "Beside the paper (its figure, ours, deviation):",
        table(["", *(f"{row['context']:,}" for row in rows)], _lines(rows)),
        _terms_sentence(rows[-1]),
        _ratio_sentence(rows[-1]),
    ]


def _lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    def cell(row: dict[str, Any], key: str) -> str:
        stated = PAPER[row["context"]][key]
        return f"{stated} / {row[key]:.2f} / {row[key] / stated - 1:+.1%}"

    lines = [[label, *(cell(row, key) for row in rows)] for key, label in LABELS.items()]
    for label, side in (("full", "gflop_full"), ("LSA", "gflop_lsa")):
        lines.append([f"GFLOP {label}, left out", *(f"{row[side] - row[f'{side}_paper']:.2f}" for row in rows)])
        lines.append([f"GFLOP {label}, complete", *(f"{row[side]:.2f}" for row in rows)])
    lines.append(["full / LSA: paper", *(f"{_stated_ratio(row):.2f}" for row in rows)])
    lines.append(["full / LSA: complete", *(f"{row['gflop_full'] / row['gflop_lsa']:.2f}" for row in rows)])
    return lines


def _stated_ratio(row: dict[str, Any]) -> float:
    stated = PAPER[row["context"]]
    return stated["gflop_full_paper"] / stated["gflop_lsa_paper"]


def _terms_sentence(row: dict[str, Any]) -> str:
    """Which terms only one column, or neither, holds."""
    terms = row["gflop_terms"]

    def named(full: bool, lsa: bool) -> str:
        chosen = {name: term for name, term in terms.items() if (term["paper_full"], term["paper_lsa"]) == (full, lsa)}
        return ", ".join(f"{name} {term['full'] or term['lsa']:.2f}" for name, term in chosen.items())

    return (
        f"Its two columns do not count the same terms. At {row['context']:,} tokens, in GFLOP: only in the full one, "
        f"{named(True, False)}; only in the LSA one, {named(False, True)}; in neither, {named(False, False)}."
    )


def _ratio_sentence(row: dict[str, Any]) -> str:
    complete = row["gflop_full"] / row["gflop_lsa"]
    return (
        f"The paper's columns promise {_stated_ratio(row):.2f} times fewer operations per token at {row['context']:,} "
        f"tokens; with every term in both columns it is {complete:.2f}."
    )
