"""A plan for people: Markdown tables, the paper's figures beside them, a plot up to 1M tokens, and files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data_gen.core.files import sweep, write_atomically
from eval.plan.plan import CapacityPlan, PlanSettings, plan_row
from eval.plan.shapes import UNNAMED_DTYPE
from eval.report.tables import Table

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

PLOT_CONTEXTS = [2**20 * step // 64 for step in range(1, 65)]
POINT = "the paper's figure, its own terms"
FIXED = "same at every context"
"""In the plot, the sum of all terms that neither a context nor LSA changes: projections, experts, output head."""
COLORS = {
    FIXED: "tab:gray",
    "CSA index keys": "tab:blue",
    "CSA scoring": "tab:blue",
    "index keys": "tab:blue",
    "token scoring": "tab:blue",
    "CSA entries": "tab:orange",
    "CSA attention": "tab:orange",
    "latents": "tab:orange",
    "latent attention": "tab:orange",
    "full-attention KV": "tab:orange",
    "full attention": "tab:orange",
    "HCA entries": "tab:green",
    "HCA attention": "tab:green",
    "window": "tab:red",
    "window attention": "tab:red",
    "memory indexer keys": "tab:purple",
    "memory indexer scoring": "tab:purple",
    "memory indexer projections": "tab:pink",
}


def plan_text(plan: CapacityPlan) -> str:
    """Summary, bytes by kind, operations by term and, where it has figures, the paper beside them."""
    first = plan.rows[0]
    weights = sum(weight.values for weight in plan.model.weights) / 1e9
    used = sum(weight.used for weight in plan.model.weights) / 1e9
    settings = plan.settings
    parts = [
        f"# {plan.model.name}",
        f"{weights:.4g} B weights ({used:.3g} B multiplied per token), {first['weights_gb']:.1f} GiB; "
        f"{first['kv_bytes_per_token']:,.0f} bytes of cache per token. LSA: {settings.kept:.2%} of the chunks of "
        f"{plan.model.chunk_tokens} tokens resident; every {settings.window} tokens a refresh replaces "
        f"{settings.churn:.0%} of them.",
        "GiB and MiB are 2^30 and 2^20 bytes, GFLOP 1e9 operations per decoded token.",
        _summary(plan),
        "Cache on the GPU by kind, GiB, full / LSA:",
        _terms(plan, "kv_terms", "{:.3f}"),
        "Operations by term, GFLOP, full / LSA:",
        _terms(plan, "gflop_terms", "{:.2f}"),
        *beside_paper(plan),
        *_notes(plan),
    ]
    return "\n\n".join(parts)


def _summary(plan: CapacityPlan) -> str:
    asked = plan.settings.gpu_memory is not None
    header = ["context", "KV GiB full", "KV GiB LSA", "GFLOP full", "GFLOP LSA", "full / LSA", "host pool GiB",
              "fetch MiB / refresh", "fetch MiB / token"]  # fmt: skip
    lines = []
    for row in plan.rows:
        ratio = row["gflop_full"] / row["gflop_lsa"]
        line = [context_label(row["context"]), row["kv_gb_full"], row["kv_gb_lsa"], f"{row['gflop_full']:.2f}",
                f"{row['gflop_lsa']:.2f}", f"{ratio:.2f}", row["host_gb"], f"{row['fetch_mb_per_refresh']:.1f}",
                f"{row['fetch_mb_per_token']:.2f}"]  # fmt: skip
        lines.append(line + ([row["requests_full"], row["requests_lsa"]] if asked else []))
    return str(Table(header + (["requests full", "requests LSA"] if asked else []), lines))


def _terms(plan: CapacityPlan, key: str, form: str) -> str:
    def cell(pair: Mapping[str, float]) -> str:
        return f"{form.format(pair['full'])} / {form.format(pair['lsa'])}"

    names = plan.rows[0][key]
    lines = [[name, *(cell(row[key][name]) for row in plan.rows)] for name in names]
    sums = [{side: sum(pair[side] for pair in row[key].values()) for side in ("full", "lsa")} for row in plan.rows]
    lines.append(["total", *(cell(total) for total in sums)])
    return str(Table(["", *(context_label(row["context"]) for row in plan.rows)], lines))


def _notes(plan: CapacityPlan) -> list[str]:
    notes = ["Not counted: norms, rotations, softmax and selection; activations and an engine's workspace."]
    if not plan.model.dtype_named:
        notes.append(f"The configuration names no dtype; {UNNAMED_DTYPE} is assumed.")
    if beyond := [row["context"] for row in plan.rows if not row["within_model"]]:
        notes.append(f"The model was made for {plan.model.positions:,} tokens; {beyond[0]:,} and more lie beyond that.")
    if plan.settings.gpu_memory is not None:
        first = plan.rows[0]
        notes.append(
            f"Requests on {plan.settings.gpus} x {plan.settings.gpu_memory:g} GiB: weights spread evenly "
            f"({first['weights_gb']:.1f} GiB; {first['weights_gb_lsa']:.1f} with a memory indexer on each), "
            "a request's cache whole on one GPU."
        )
    return notes


def context_label(context: int) -> str:
    """256K, 1M; other numbers in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if context % size == 0:
            return f"{context // size}{letter}"
    return f"{context:,}"


def _comparable(plan: CapacityPlan) -> bool:
    default = PlanSettings()
    same = all(getattr(plan.settings, name) == getattr(default, name) for name in SHARED)
    return same and plan.model.name == PAPER_MODEL


def paper_points(plan: CapacityPlan, quantity: str, side: str) -> list[tuple[int, float]]:
    """(context, figure) that the paper states of `kv_gb` or `gflop`, side `full` or `lsa`, where comparable."""
    keys = (f"{quantity}_{side}", f"{quantity}_{side}_paper")
    found = [(context, stated[key]) for context, stated in PAPER.items() for key in keys if key in stated]
    return found if _comparable(plan) else []


def beside_paper(plan: CapacityPlan) -> list[str]:
    """Paragraphs that reconcile a plan with the paper; none for another model, other settings or other contexts."""
    rows = [row for row in plan.rows if row["context"] in PAPER]
    if not rows or not _comparable(plan):
        return []
    return [
        "Beside the paper (its figure, ours, deviation):",
        str(Table(["", *(f"{row['context']:,}" for row in rows)], _paper_lines(rows))),
        _terms_sentence(rows[-1]),
        _ratio_sentence(rows[-1]),
    ]


def _paper_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
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


def plot_plan(plan: CapacityPlan, path: Path) -> None:
    """Bytes (top) and operations (bottom) by term up to 1M tokens, full (left) and LSA (right); PNG."""
    rows = [plan_row(plan.model, plan.settings, context) for context in PLOT_CONTEXTS]
    figure = Figure(figsize=(10, 7.4), layout="tight")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    titles = ("KV cache of one request on the GPU, GiB", "operations per decoded token, GFLOP")
    for line, terms in enumerate((_kv_layers(rows), _flop_layers(rows))):
        for column, side in enumerate(("full", "lsa")):
            _stack(axes[line][column], terms, side)
            for context, figure_stated in paper_points(plan, ("kv_gb", "gflop")[line], side):
                axes[line][column].plot(context / 1024, figure_stated, "kx", label=POINT)
        axes[line][0].set_ylabel(titles[line])
        handles = {label: handle for handle, label in zip(*axes[line][0].get_legend_handles_labels(), strict=True)}
        axes[line][0].legend(handles.values(), handles, loc="upper left", fontsize=8, reverse=True)
    axes[0][0].set_title(f"{plan.model.name}, full attention")
    axes[0][1].set_title(f"lookahead sparse attention, {plan.settings.kept:.1%} resident")
    for axis in axes[1]:
        axis.set_xlabel("context, tokens")
        axis.set_xticks([256, 512, 768, 1024], ["256K", "512K", "768K", "1M"])
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))


Layers = dict[str, dict[str, list[float]]]


def _kv_layers(rows: list[dict[str, Any]]) -> Layers:
    names = rows[0]["kv_terms"]
    return {name: {side: [row["kv_terms"][name][side] for row in rows] for side in ("full", "lsa")} for name in names}


def _flop_layers(rows: list[dict[str, Any]]) -> Layers:
    """As `_kv_layers`; terms that are the same at every context and on both sides are joined into one."""
    layers: Layers = {FIXED: {side: [0.0] * len(rows) for side in ("full", "lsa")}}
    for name in rows[0]["gflop_terms"]:
        found = {side: [row["gflop_terms"][name][side] for row in rows] for side in ("full", "lsa")}
        if len({*found["full"], *found["lsa"]}) == 1:
            for side, values in found.items():
                layers[FIXED][side] = [a + b for a, b in zip(layers[FIXED][side], values, strict=True)]
        else:
            layers[name] = found
    return layers


def _stack(axis: Any, terms: Layers, side: str) -> None:
    xs = [context / 1024 for context in PLOT_CONTEXTS]
    series = [values[side] for values in terms.values()]
    axis.stackplot(xs, *series, labels=list(terms), colors=[COLORS[name] for name in terms])
    top = sum(values[-1] for values in series)
    axis.annotate(f"{top:.3g} at 1M", (xs[-1], top), ha="right", va="bottom", fontsize=9, fontweight="bold")
    axis.set_xlim(0, xs[-1])
    axis.margins(y=0.1)
    axis.grid(alpha=0.3)


def plan_json(plan: CapacityPlan) -> str:
    """The rows as a JSON list."""
    return json.dumps(plan.rows, indent=1)


def write_plan(plan: CapacityPlan, folder: Path) -> None:
    """Write plan.json, plan.md and plan.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for name, text in (("plan.json", plan_json(plan)), ("plan.md", plan_text(plan) + "\n")):
        write_atomically(folder / name, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    plot_plan(plan, folder / "plan.png")
