"""The sections of the report, from rows of results.json: what each says, its pictures and its tables."""

from collections.abc import Callable
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from eval.report import diagnosis, figures
from eval.report.rows import RecallRow, Results
from eval.report.tables import (
    GROUPS,
    STYLES,
    Table,
    bounds,
    comparison_table,
    cut_name,
    decode_table,
    depth_name,
    length_name,
    number,
    policy_order,
    recall_table,
)
from eval.report.tasks import answer_tables, average_table, fidelity_table
from indexer_train.losses import gives_probabilities

RECALLS = ("mass_recall", "golden_recall")
MEANS = "Means over tasks and lengths"


@dataclass(frozen=True)
class Section:
    """anchor: its id in the page; text: what it says; pictures: by id, None where there was nothing to draw; tables: by
    caption; folded: fold even short ones; open: the caption of one that is never folded."""

    anchor: str
    title: str
    text: str
    pictures: dict[str, Figure | None] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    folded: bool = False
    open: str | None = None


def _decode(results: Results) -> Section | None:
    if not results.decode:
        return None
    text = (
        "The same documents under every policy, each from one prefill. KV is the keys and values of the full-attention "
        "layers that are resident while answering. Every policy has the same protected chunks on top of its budget."
    )
    pictures = {"accuracy": figures.accuracy_against_bytes(results.decode)}
    return Section("answers", "Accuracy against KV bytes", text, pictures, {"": decode_table(results.decode)}, open="")


def _benchmark(results: Results) -> Section | None:
    if not results.benchmark:
        return None
    pictures = {
        "benchmark": figures.accuracy_by_bytes(results.benchmark),
        "depth": figures.answers_by_depth(results.benchmark_depth or []),
    }
    text = (
        "Answers from one prefill; every policy has the same protected chunks on top. KV is the keys and values of "
        "the full-attention layers that are resident while answering. Intervals are Wilson intervals where an answer "
        "is right or wrong, and bootstraps over examples where it gets a score in between; differences from full "
        "attention are paired. 'mrcr' needs the whole history, where sparse attention is known to fail. The oracle "
        "knows what full attention's own answer attended to. 'frequency' has no row, because counting golden chunks "
        "takes the attention of every token of the prompt, which one prefill does not give. The share of full "
        "attention is that of the average accuracy, next to the mean of each line's share of the bytes."
    )
    tables = {MEANS: average_table(results.benchmark), **answer_tables(results.benchmark)}
    return Section("tasks", "Benchmark: accuracy against KV bytes", text, pictures, tables, open=MEANS)


def _text(results: Results) -> Section | None:
    picture = figures.kl_against_bytes(results.decode or [], results.benchmark_text or [])
    if picture is None:
        return None
    text = (
        "Held-out text is read under each policy, one token at a time. The rows say how far the distribution of the "
        "next token is from full attention's (0 is the same), and how many KV bytes were resident. Intervals are "
        "bootstraps over texts."
    )
    tables = {"Fidelity of plain text": fidelity_table(results.benchmark_text)} if results.benchmark_text else {}
    return Section("text", "Text: KL from full attention", text, {"kl": picture}, tables)


def _recall(results: Results) -> Section | None:
    if results.recall is None:
        return None
    notes = results.evaluated.notes if results.evaluated else []
    text = (
        "For diagnosis only: recall ranks policies differently from answers. Every chunk is scored. Every policy gets "
        "the same budget on top of the same protected chunks, which do not count. These are macro averages over "
        "documents; bands are 95 % bootstrap intervals over documents. Each metric has an oracle of its own as its "
        "bound. 'exact_attention' ranks by what the backbone attended to at the window's first token, 'native_votes' "
        "by how many of its own indexers picked a chunk there, 'frequency' by how often a chunk was golden so far. "
        "All three see full attention, which sparse serving would not have."
    )
    tables = {"": recall_table(row for row in results.recall if row.policy != "protected")}
    pictures = {"recall": figures.recall_curves(results.recall)}
    return Section("budgets", "Recall against budget", " ".join([text, *notes]), pictures, tables)


def _comparison(results: Results) -> Section | None:
    if not results.comparison:
        return None
    text = "The same documents for both; the 95 % interval is a paired bootstrap of the per-document differences."
    return Section("comparison", "A beside B", text, tables={"": comparison_table(results.comparison)})


def _places(results: Results) -> Section | None:
    """Recall by the length of the document and by the depth of the needle."""
    if results.evaluated is None:
        return None
    budget = results.evaluated.budget
    lengths = [(row.length, length_name(row.length), row) for row in results.by_length or []]
    depths = [(row.depth, depth_name(row.depth), row) for row in results.by_depth or []]
    tables = {}
    for caption, places in (("length, tokens", lengths), ("depth of the needle", depths)):
        shown = [each for each in places if each[2].budget == budget and each[2].policy in STYLES]
        shown = [each for each in shown if each[2].policy != "protected"]
        lines = [
            [name, row.policy, *(_with_bounds(row, metric) for metric in RECALLS), row.documents]
            for _, name, row in sorted(shown, key=lambda each: (each[0], policy_order(each[2].policy)))
        ]
        if lines:
            header = [caption, "policy", "macro mass recall", "macro golden recall", "documents"]
            tables[f"By {caption}"] = Table(header, lines)
    if not tables:
        return None
    text = f"At {budget:.1%} kept; depths from the start of the document."
    return Section("places", "Recall by length and depth", text, tables=tables)


def _depth(results: Results) -> Section | None:
    if results.evaluated is None:
        return None
    picture = figures.depth_by_length(results.heat or [], results.evaluated.bins)
    if picture is None:
        return None
    budget = results.evaluated.budget
    text = f"Of {_first(results)}, at {cut_name(budget)} kept; n: documents of a cell. Few of them mean little."
    return Section("cells", "Needle depth and document length", text, {"heat": picture})


def _tops(results: Results) -> Section | None:
    """recall@K of the indexers, of their layers and of what bounds them, a table for each task."""
    rows = [row for row in results.recall or [] if row.top is not None and row.policy != "protected"]
    counts = sorted({row.top for row in rows if row.top is not None})
    cells = {(row.task, row.policy, row.top): number(row.golden_recall, row.documents) for row in rows}
    tables = {}
    for task in sorted({row.task for row in rows}, key=_group_order):
        policies = sorted({row.policy for row in rows if row.task == task}, key=policy_order)
        lines = [[policy, *(cells.get((task, policy, count)) for count in counts)] for policy in policies]
        tables[task] = Table(["policy", *(f"@{count}" for count in counts)], lines)
    if not tables:
        return None
    text = "Share of the golden chunks among the K best candidates, macro averages over documents, a table a task."
    return Section("tops", "Recall@K of golden chunks (macro)", text, tables=tables, folded=True)


def _metrics(results: Results) -> Section | None:
    """Every metric at the budget and at what was calibrated, macro with its interval, and micro."""
    if results.evaluated is None:
        return None
    cuts = (results.evaluated.budget, "threshold", "coverage")
    rows = [row for row in results.recall or [] if row.budget in cuts and row.task in GROUPS]
    # A layer has no rule of its own: the joined score's threshold keeps nearly everything of it.
    rows = [row for row in rows if row.policy != "protected" and (row.layer is None or row.budget == cuts[0])]
    rows.sort(key=lambda row: (_group_order(row.task), cuts.index(row.budget), policy_order(row.policy)))
    if not rows:
        return None
    macro, micro = [], []
    for row in rows:
        place = [row.task, row.policy, cut_name(row.budget)]
        values = [number(getattr(row, name), row.documents) for name in ("precision", "f1", "kept", "resident_mass")]
        macro.append([*place, *(_with_bounds(row, metric) for metric in RECALLS), *values])
        names = (*RECALLS, "precision", "f1")
        micro.append([*place, *(number(getattr(row.micro, name), row.documents) for name in names)])
    names = ["mass recall", "golden recall", "precision", "F1"]
    places = ["task", "policy", "cut"]
    tables = {
        "Macro averages": Table([*places, *(f"macro {name}" for name in [*names, "kept", "resident mass"])], macro),
        "Micro averages": Table([*places, *(f"micro {name}" for name in names)], micro),
    }
    text = (
        "Macro averages with 95 % intervals over documents, and micro averages, which add up windows before dividing. "
        "'layer L' is one of the indexer's layers on its own. 'resident mass' is the share of all attention that is "
        "not on evicted chunks: there, and only there, protected chunks count."
    )
    return Section("metrics", "Every metric at the budget and as calibrated", text, tables=tables, folded=True)


def _calibration(results: Results) -> Section | None:
    if results.documents is None or results.evaluated is None:
        return None
    first, *_ = results.evaluated.thresholds.values()
    evaluated = results.measured.get("evaluate")
    probabilities = gives_probabilities(None if evaluated is None else evaluated.loss)
    pictures = {
        "reliability": diagnosis.reliability_curve(results.reliability or [], probabilities),
        "threshold": diagnosis.threshold_transfer(results.documents, results.evaluated.budget),
    }
    meant = "a calibrated probability would lie on the observed share"
    if not probabilities:
        meant = "its loss trained an order, so a sigmoid of the score means nothing and is not drawn"
    text = (
        f"Of {_first(results)}. First: chunks in bins of equal counts, from the lowest scores to the highest; {meant}. "
        f"Then: what the one calibrated threshold ({first}) kept of each held-out document; the line is the budget of "
        "the other figures."
    )
    return Section("calibration", "Calibration", text, pictures)


def _timeline(results: Results) -> Section | None:
    found = results.timeline
    if found is None:
        return None
    text = (
        f"{found.document} ({found.task}), under {_first(results)}. Each dot is a chunk that a token attended to "
        "(golden), outside the protected ones."
    )
    return Section("document", "One document, token by token", text, {"timeline": diagnosis.score_timeline(found)})


def _time(results: Results) -> Section | None:
    found = results.lookahead
    if found is None:
        return None
    pictures = {"lookahead": diagnosis.refreshes(found), "churn": diagnosis.churn(found)}
    text = (
        "The same budget, refreshed more or less often. Chunks that arrive after a refresh stay resident until the "
        "next, so recall is over the chunks that were there at the refresh; compare it with the oracle at the same "
        "interval. Churn counts selected chunks that were not resident before; recency keeps only chunks that are "
        "already resident."
    )
    return Section("time", "Lookahead and churn", text, pictures)


SECTIONS: list[Callable[[Results], Section | None]] = [
    _decode, _benchmark, _text, _recall, _comparison, _places, _depth, _tops, _metrics, _calibration, _timeline, _time,
]  # fmt: skip
"""In the order of the page: outputs and bytes, then diagnosis."""


def _first(results: Results) -> str:
    """The indexer that the sections of one are about: of two, the first."""
    first, *others = results.evaluated.thresholds if results.evaluated else ["indexer"]
    return f"indexer {first} (not {others[0]})" if others else "the indexer"


def _group_order(task: str) -> tuple[int, str]:
    return (GROUPS.index(task) if task in GROUPS else len(GROUPS)), task


def _with_bounds(row: RecallRow, metric: str) -> str:
    return number(getattr(row, metric), row.documents) + bounds(getattr(row.interval, metric), row.documents)
