"""The benchmark's tables: accuracy against KV bytes in the shape of the paper's Table 1, and fidelity of text."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from eval.report.tables import table

Rows = list[dict[str, Any]]


def benchmark_table(rows: Rows) -> str:
    """A line per task and length, a column per policy: accuracy in %, its 95 % interval, resident KV in MB, and windows
    under full attention where those are counted.
    """
    columns, lines = list(dict.fromkeys(map(column_name, rows))), []
    cells = {(*_place(row), column_name(row)): row for row in rows}
    for place in dict.fromkeys(map(_place, rows)):
        found = [cells.get((*place, column)) for column in columns]
        first = next(row for row in found if row is not None)
        lines.append([" ".join(dict.fromkeys(place[:2])), _length(first), first["examples"], *map(_cell, found)])
    lines += _averages(rows, columns)
    return table(["accuracy % [95 % interval] / KV MB", "tokens", "n", *columns], lines)


def difference_table(rows: Rows) -> str:
    """A line per task and length, a column per policy: accuracy less full attention's, and the share kept."""
    rows = [row for row in rows if row["policy"] != "full"]
    columns = list(dict.fromkeys(map(column_name, rows)))
    cells = {(*_place(row), column_name(row)): row for row in rows}
    lines = []
    for place in dict.fromkeys(map(_place, rows)):
        found = [cells.get((*place, column)) for column in columns]
        first = next(row for row in found if row is not None)
        lines.append([" ".join(dict.fromkeys(place[:2])), _length(first), *map(_beside_full, found)])
    return table(["points from full [95 % interval] / kept", "tokens", *columns], lines)


def fidelity_table(rows: Rows) -> str:
    """A line per length and policy: agreement with full attention, KL from it and perplexity."""
    lines = [
        [
            _length(row),
            column_name(row),
            row["texts"],
            f"{row['agreement']:.3f}{_bounds(row['agreement_interval'])}",
            f"{row['kl']:.3f}{_bounds(row['kl_interval'])}",
            row["perplexity"],
            f"{row['kept']:.1%}",
            f"{row['kv_mb']:.1f}",
        ]
        for row in rows
    ]
    header = ["text, tokens", "policy", "texts", "next-token agreement", "KL to full, nats", "perplexity", "kept"]
    return table([*header, "KV MB"], lines)


def column_name(row: dict[str, Any]) -> str:
    """The policy, with its budget where it has one."""
    return row["policy"] if row["budget"] is None else f"{row['policy']} {row['budget']:.0%}"


def _place(row: dict[str, Any]) -> tuple[str, str, int | None]:
    return row["benchmark"], row["task"], row["length"]


def _length(row: dict[str, Any]) -> str:
    beyond = "" if row["beyond"] is None or row["beyond"] <= 1.01 else f" ({row['beyond']:.1f}x trained)"
    return f"{row['tokens']:.0f}{beyond}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    interval = "" if row["low"] is None else f" [{100 * row['low']:.0f}-{100 * row['high']:.0f}]"
    full = f", {row['fallbacks']} of {row['windows']} full" if "windows" in row else ""
    return f"{100 * row['accuracy']:.0f}{interval} / {row['kv_mb']:.1f}{full}"


def _beside_full(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    bounds = (row["difference_low"], row["difference_high"])
    interval = "" if bounds[0] is None else f" [{100 * bounds[0]:+.0f}, {100 * bounds[1]:+.0f}]"
    return f"{100 * row['difference']:+.0f}{interval} / {row['kept']:.1%}"


def _averages(rows: Rows, columns: list[str]) -> list[list[str]]:
    """Two lines: means over the lines above, and the same as shares of full attention's.

    The share of the bytes is the mean of each line's share, as the paper's.
    """
    found: dict[str, Rows] = defaultdict(list)
    for row in rows:
        found[column_name(row)].append(row)
    full = {_place(row): row["kv_mb"] for row in found["full"]}
    averages, shares = ["average", "", ""], ["share of full", "", ""]
    best = sum(row["accuracy"] for row in found["full"])
    for members in (found[column] for column in columns):
        accuracy = sum(row["accuracy"] for row in members)
        averages.append(f"{100 * accuracy / len(members):.1f} / {_mean(row['kv_mb'] for row in members):.1f}")
        bytes_share = _mean(row["kv_mb"] / full[_place(row)] for row in members)
        shares.append(f"{f'{accuracy / best:.0%}' if best else '-'} / {bytes_share:.1%}")
    return [averages, shares]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _bounds(interval: list[float | None]) -> str:
    return "" if interval[0] is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
