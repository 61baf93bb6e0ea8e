"""What the pocket models answer under each policy: questions right, by length and task, of `lookahead benchmark` runs.

    python -m benchmarks.pocket_table runs/pocket --write benchmarks/results/pocket-table.json

Right is an answer with all that was asked for; the score counts parts, as results.json does. The task `all` is all four
together, which have as many questions each; intervals are Wilson's. The last lines are means over the lengths. Commit
and day are those of the benchmark.
"""

import argparse
import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import origin
from data_gen.core.errors import InputError
from data_gen.core.files import whole
from eval.online.benchmark import JOURNAL
from eval.online.records import Record, RunRecord
from eval.online.summary import wilson
from eval.report.tables import Table, read_results

ALL = "all"
NAMES = ("pocket", "length", "task", "policy", "budget")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row for each length, task, policy and budget of one run folder, in the order asked.

    Raises InputError for a damaged file, SystemExit for a folder that is no finished benchmark of scored questions.
    """
    results, path = read_results(folder), folder / JOURNAL
    measured = results.measured.get("benchmark")
    if measured is None:
        raise SystemExit(f"{folder}: no benchmark in its results.json; run lookahead benchmark with --out {folder}")
    with whole(path, "journal", f"run lookahead benchmark again with --out {folder}"):
        _, *lines = path.read_text(encoding="utf-8").splitlines()  # after its settings
        records = [Record.model_validate_json(line) for line in lines]
    said, asked = Counter[tuple[str, str, float | None]](), Counter[tuple[str, str, float | None]]()
    cells: dict[tuple[int, str, str, float | None], list[RunRecord]] = defaultdict(list)
    for row in results.benchmark or []:
        said[row.task, row.policy, row.budget] += row.examples
    for record in records:
        if record.left_out:
            raise SystemExit(f"{folder}: {record.name} was not asked: {record.left_out}")
        if unscored := [run.policy for run in record.runs if run.score is None]:
            raise SystemExit(f"{folder}: {record.name} has no score under {unscored[0]}: it is no question")
        task, length = record.task.rsplit("-", 1)
        for run in record.runs:
            asked[record.task, run.policy, run.budget] += 1
            for name in (task, ALL):
                cells[int(length), name, run.policy, run.budget].append(run)
    if other := [cell for cell in said | asked if said[cell] != asked[cell]]:
        raise SystemExit(
            f"{path}: {asked[other[0]]} answers to {other[0][0]} under {other[0][1]}, results.json counts "
            f"{said[other[0]]}: they are of different runs; run lookahead benchmark into a new folder"
        )
    made = {"commit": measured.commit, "date": measured.date}
    found = sorted(cells.items(), key=lambda cell: cell[0][0])
    return [dict(zip(NAMES, (folder.name, *key), strict=True)) | _counted(runs) | made for key, runs in found]


def _counted(runs: list[RunRecord]) -> dict[str, Any]:
    right = sum(run.score == 1 for run in runs)
    low, high = wilson(right, len(runs))
    return {
        "right": right, "questions": len(runs), "low": round(low, 3), "high": round(high, 3),
        "score": round(statistics.fmean(run.score or 0 for run in runs), 4),
        "kept": round(statistics.fmean(run.kept for run in runs), 4),
    }  # fmt: skip


def tables(data: dict[str, Any]) -> list[str]:
    """Markdown, a table for each pocket: a line for each length and policy, a column for each task and for all."""
    found: dict[str, dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = {}
    for row in data["rows"]:
        lines = found.setdefault(row["pocket"], {})
        lines.setdefault((row["length"], row["policy"], row["budget"]), {})[row["task"]] = row
    tasks = [*dict.fromkeys(row["task"] for row in data["rows"] if row["task"] != ALL), ALL]
    header = ["tokens", "policy", "budget", *tasks, "share of all", "score", "KV kept"]
    made = []
    for pocket, lines in found.items():
        body = [[*key, *(_cell(cells[task]) for task in tasks), _share(cells[ALL]), *_means([cells[ALL]])]
                for key, cells in lines.items()]  # fmt: skip
        for policy, budget in dict.fromkeys(key[1:] for key in lines):
            over = [cells[ALL] for key, cells in lines.items() if key[1:] == (policy, budget)]
            body.append(["mean", policy, budget, *(None for _ in tasks), None, *_means(over)])
        made.append(f"`{pocket}`, questions right:\n\n{Table(header, body)}")
    return made


def _means(rows: list[dict[str, Any]]) -> list[str]:
    """Score and KV kept, averaged."""
    return [f"{statistics.fmean(row[name] for row in rows):.1%}" for name in ("score", "kept")]


def _cell(row: dict[str, Any]) -> str:
    return f"{row['right']} of {row['questions']}"


def _share(row: dict[str, Any]) -> str:
    return f"{row['right'] / row['questions']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def main() -> None:
    """Print the tables, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of runs of a pocket recipe's benchmark")
    parser.add_argument("--write", type=Path, help="JSON file")
    options = parser.parse_args()
    try:
        data = {"origin": origin(), "rows": [row for folder in options.folders for row in rows_of(folder)]}
    except InputError as error:
        raise SystemExit(str(error)) from error
    print("\n\n".join(tables(data)))
    if options.write:
        options.write.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
