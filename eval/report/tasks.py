"""The benchmark's tables: accuracy against KV bytes in the shape of the paper's Table 1, and fidelity of text."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval.report.rows import AccuracyRow, FidelityRow
from eval.report.tables import FEW, Table, bounds, number

Rows = Sequence[AccuracyRow]
Place = tuple[str, str, int | None]
Column = tuple[str, float | None]


def benchmark_table(rows: Rows) -> Table:
    """A line per task and length, a column per policy: accuracy in %, its 95 % interval, resident KV in MB, and windows
    under full attention where those are counted.
    """
    columns, lines = _columns(rows), []
    cells = {(_place(row), row.policy, row.budget): row for row in rows}
    for place in dict.fromkeys(map(_place, rows)):
        found = [cells.get((place, *column)) for column in columns]
        first = next(row for row in found if row is not None)
        lines.append([_task(place), _length(first), first.examples, *map(_cell, found)])
    averages = average_rows(rows)
    lines.append(["average", "", "", *(f"{mean.percent} / {mean.kv_mb:.1f}" for mean in averages)])
    lines.append(["share of full", "", "", *(f"{mean.of_full} / {mean.kv_share:.1%}" for mean in averages)])
    return Table(["accuracy % [95 % interval] / KV MB", "tokens", "n", *columns.values()], lines)


def difference_table(rows: Rows) -> Table:
    """A line per task and length, a column per policy: accuracy less full attention's, and the share kept."""
    rows = [row for row in rows if row.policy != "full"]
    columns, lines = _columns(rows), []
    cells = {(_place(row), row.policy, row.budget): row for row in rows}
    for place in dict.fromkeys(map(_place, rows)):
        found = [cells.get((place, *column)) for column in columns]
        first = next(row for row in found if row is not None)
        lines.append([_task(place), _length(first), *map(_beside_full, found)])
    return Table(["points from full [95 % interval] / kept", "tokens", *columns.values()], lines)


@dataclass(frozen=True)
class Average:
    """Means of one policy and budget over tasks and lengths.

    examples: of all tasks and lengths; accuracy: 0 to 1; kv_mb: resident, in 10^6 bytes; accuracy_share: of full
    attention's, None where that has none; kv_share: the mean of each line's share of full attention's bytes, as the
    paper's.
    """

    policy: str
    budget: float | None
    examples: int
    accuracy: float
    kv_mb: float
    accuracy_share: float | None
    kv_share: float

    @property
    def percent(self) -> str:
        """The accuracy in %, with a decimal where FEW examples or more stand behind it."""
        return f"{100 * self.accuracy:.{0 if self.examples < FEW else 1}f}"

    @property
    def of_full(self) -> str:
        """The share of full attention's accuracy, a dash where there is none."""
        return "-" if self.accuracy_share is None else f"{self.accuracy_share:.0%}"


def average_rows(rows: Rows) -> list[Average]:
    """Means over tasks and lengths, one for each policy and budget in the order of `rows`."""
    found: dict[Column, list[AccuracyRow]] = defaultdict(list)
    for row in rows:
        found[row.policy, row.budget].append(row)
    full = {_place(row): row.kv_mb for row in rows if row.policy == "full"}
    best = sum(row.accuracy for row in rows if row.policy == "full")
    averages = []
    for (policy, budget), members in found.items():
        accuracy = sum(row.accuracy for row in members)
        averages.append(
            Average(
                policy=policy,
                budget=budget,
                examples=sum(row.examples for row in members),
                accuracy=accuracy / len(members),
                kv_mb=_mean(row.kv_mb for row in members),
                accuracy_share=accuracy / best if best else None,
                kv_share=_mean(row.kv_mb / full[_place(row)] for row in members),
            )
        )
    return averages


def average_table(rows: Rows) -> Table:
    """`average_rows`, a line per policy."""
    lines = [[column_name(mean), mean.percent, f"{mean.kv_mb:.1f}", mean.of_full, f"{mean.kv_share:.1%}"]
             for mean in average_rows(rows)]  # fmt: skip
    return Table(["policy", "accuracy %, mean", "KV MB, mean", "accuracy, of full", "KV, of full"], lines)


def answer_tables(rows: Rows) -> dict[str, Table]:
    """For each benchmark and length, by name: a line per task and policy, with its accuracy, the points from full
    attention on the same examples, and what was resident."""
    groups: dict[tuple[str, int | None], list[AccuracyRow]] = defaultdict(list)
    for row in rows:
        groups[row.benchmark, row.length].append(row)
    header = ["task", "policy", "n", "accuracy %", "points from full", "kept", "KV MB"]
    tables = {}
    for (benchmark, _), members in groups.items():
        counted = any(row.windows is not None for row in members)
        lines = []
        for task in dict.fromkeys(row.task for row in members):
            for row in (row for row in members if row.task == task):
                full = [None if row.windows is None else f"{row.fallbacks} of {row.windows}"] if counted else []
                points = None if row.policy == "full" else _points(row)
                lines.append([row.task, column_name(row), row.examples, _accuracy(row), points, f"{row.kept:.1%}",
                              f"{row.kv_mb:.1f}", *full])  # fmt: skip
        caption = f"{benchmark}, {members[0].tokens:,.0f} tokens{_beyond(members[0])}"
        tables[caption] = Table(header + (["windows under full"] if counted else []), lines)
    return tables


def fidelity_table(rows: Iterable[FidelityRow]) -> Table:
    """A line per length and policy: KL from full attention, agreement with it and perplexity."""
    lines = [
        [
            _length(row),
            column_name(row),
            row.texts,
            f"{number(row.kl, row.texts)}{bounds(row.kl_interval, row.texts)}",
            f"{number(row.agreement, row.texts)}{bounds(row.agreement_interval, row.texts)}",
            number(row.perplexity, row.texts),
            f"{row.kept:.1%}",
            f"{row.kv_mb:.1f}",
        ]
        for row in rows
    ]
    header = ["text, tokens", "policy", "texts", "KL to full, nats", "next-token agreement", "perplexity", "kept"]
    return Table([*header, "KV MB"], lines)


def column_name(row: AccuracyRow | FidelityRow | Average) -> str:
    """The policy, with its budget where it has one."""
    return row.policy if row.budget is None else f"{row.policy} {100 * row.budget:g}%"


def _columns(rows: Rows) -> dict[Column, str]:
    """Names of the columns by policy and budget, in the order of `rows`."""
    return {(row.policy, row.budget): column_name(row) for row in rows}


def _place(row: AccuracyRow) -> Place:
    return row.benchmark, row.task, row.length


def _task(place: Place) -> str:
    return " ".join(dict.fromkeys(place[:2]))


def _length(row: AccuracyRow | FidelityRow) -> str:
    return f"{row.tokens:.0f}{_beyond(row)}"


def _beyond(row: AccuracyRow | FidelityRow) -> str:
    """How far beyond the longest training document, in brackets after a blank; empty where it is not."""
    return "" if row.beyond is None or row.beyond <= 1.01 else f" ({row.beyond:.1f}x trained)"


def _accuracy(row: AccuracyRow) -> str:
    if row.low is None or row.high is None:
        return f"{100 * row.accuracy:.0f}"
    return f"{100 * row.accuracy:.0f} [{100 * row.low:.0f}-{100 * row.high:.0f}]"


def _points(row: AccuracyRow) -> str:
    if row.difference_low is None or row.difference_high is None:
        return f"{100 * row.difference:+.0f}"
    return f"{100 * row.difference:+.0f} [{100 * row.difference_low:+.0f}, {100 * row.difference_high:+.0f}]"


def _cell(row: AccuracyRow | None) -> str:
    if row is None:
        return "-"
    full = "" if row.windows is None else f", {row.fallbacks} of {row.windows} full"
    return f"{_accuracy(row)} / {row.kv_mb:.1f}{full}"


def _beside_full(row: AccuracyRow | None) -> str:
    return "-" if row is None else f"{_points(row)} / {row.kept:.1%}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
