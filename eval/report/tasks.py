"""The benchmark's tables: accuracy against KV bytes in the shape of the paper's Table 1, and fidelity of text."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from eval.report.rows import AccuracyRow, FidelityRow
from eval.report.tables import Table, bounds, number

Rows = Sequence[AccuracyRow]
Place = tuple[str, str, int | None]


def benchmark_table(rows: Rows) -> Table:
    """A line per task and length, a column per policy: accuracy in %, its 95 % interval, resident KV in MB, and windows
    under full attention where those are counted.
    """
    columns, lines = list(dict.fromkeys(map(column_name, rows))), []
    cells = {(*_place(row), column_name(row)): row for row in rows}
    for place in dict.fromkeys(map(_place, rows)):
        found = [cells.get((*place, column)) for column in columns]
        first = next(row for row in found if row is not None)
        lines.append([_task(place), _length(first), first.examples, *map(_cell, found)])
    averages = average_rows(rows)
    for title, (accuracy, share) in {"average": (1, 2), "share of full": (3, 4)}.items():
        lines.append([title, "", "", *(f"{line[accuracy]} / {line[share]}" for line in averages)])
    return Table(["accuracy % [95 % interval] / KV MB", "tokens", "n", *columns], lines)


def difference_table(rows: Rows) -> Table:
    """A line per task and length, a column per policy: accuracy less full attention's, and the share kept."""
    rows = [row for row in rows if row.policy != "full"]
    columns = list(dict.fromkeys(map(column_name, rows)))
    cells = {(*_place(row), column_name(row)): row for row in rows}
    lines = []
    for place in dict.fromkeys(map(_place, rows)):
        found = [cells.get((*place, column)) for column in columns]
        first = next(row for row in found if row is not None)
        lines.append([_task(place), _length(first), *map(_beside_full, found)])
    return Table(["points from full [95 % interval] / kept", "tokens", *columns], lines)


def average_rows(rows: Rows) -> list[list[Any]]:
    """Means over tasks and lengths, a line per policy: its name, accuracy in %, KV MB, and both as shares of full's.

    The share of the bytes is the mean of each line's share, as the paper's.
    """
    found: dict[str, list[AccuracyRow]] = defaultdict(list)
    for row in rows:
        found[column_name(row)].append(row)
    full = {_place(row): row.kv_mb for row in found["full"]}
    best = sum(row.accuracy for row in found["full"])
    lines = []
    for column in dict.fromkeys(map(column_name, rows)):
        members = found[column]
        accuracy = sum(row.accuracy for row in members)
        bytes_share = _mean(row.kv_mb / full[_place(row)] for row in members)
        lines.append([column, f"{100 * accuracy / len(members):.1f}", f"{_mean(row.kv_mb for row in members):.1f}",
                      f"{accuracy / best:.0%}" if best else "-", f"{bytes_share:.1%}"])  # fmt: skip
    return lines


def average_table(rows: Rows) -> Table:
    """`average_rows`, a line per policy."""
    return Table(["policy", "accuracy %, mean", "KV MB, mean", "accuracy, of full", "KV, of full"], average_rows(rows))


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
        tokens, beyond = f"{members[0].tokens:,.0f} tokens", _length(members[0]).partition(" ")[2]
        tables[" ".join(filter(None, [f"{benchmark}, {tokens}", beyond]))] = Table(
            header + (["windows under full"] if counted else []), lines
        )
    return tables


def fidelity_table(rows: Iterable[FidelityRow]) -> Table:
    """A line per length and policy: agreement with full attention, KL from it and perplexity."""
    lines = [
        [
            _length(row),
            column_name(row),
            row.texts,
            f"{number(row.agreement, row.texts)}{bounds(row.agreement_interval, row.texts)}",
            f"{number(row.kl, row.texts)}{bounds(row.kl_interval, row.texts)}",
            row.perplexity,
            f"{row.kept:.1%}",
            f"{row.kv_mb:.1f}",
        ]
        for row in rows
    ]
    header = ["text, tokens", "policy", "texts", "next-token agreement", "KL to full, nats", "perplexity", "kept"]
    return Table([*header, "KV MB"], lines)


def column_name(row: AccuracyRow | FidelityRow) -> str:
    """The policy, with its budget where it has one."""
    return row.policy if row.budget is None else f"{row.policy} {row.budget:.0%}"


def _place(row: AccuracyRow) -> Place:
    return row.benchmark, row.task, row.length


def _task(place: Place) -> str:
    return " ".join(dict.fromkeys(place[:2]))


def _length(row: AccuracyRow | FidelityRow) -> str:
    beyond = "" if row.beyond is None or row.beyond <= 1.01 else f" ({row.beyond:.1f}x trained)"
    return f"{row.tokens:.0f}{beyond}"


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
