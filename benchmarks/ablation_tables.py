"""Tables of benchmarks/ablations.py: answers and text under each policy, beside others, and what foretold them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from data_gen.text.needles import Split
from eval.report.tables import Table
from indexer_train.measure.intervals import bootstrap_means

RECIPE = "recipe"
BESIDE = (RECIPE, "recency", "mean-pooled keys")
"""Every policy is compared with these on the same documents."""
AS_MANY_BYTES = ("recency, bytes of the recipe", *(f"{name}, bytes of the correction" for name in BESIDE))
"""And with these in the rows, where they were asked."""
EVERY = "all"
"""The task of rows over all questions of a set and a length."""
SETS: dict[str, Split] = {"development": "train", "report": "heldout"}
"""Name -> whose wordings and keys its questions have."""
DIAGNOSES = ("peak_entropy", "golden_recall", "mass_recall", "peak_entropy_of_texts", "golden_recall_of_questions")
"""What documents that are neither trained on nor asked say of a trained indexer; older rows lack the last two."""


def rows(records: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """A row per set, length, task and policy; differences by pairs, [mean, low, high]; diagnoses of trained ones.

    A row has `right` and `solved` (right, where full attention is) for questions, `kl` and `agreement` for texts.
    Where a set asked more than one kind of question at a length, rows of the task EVERY are over all of them.
    """
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["set"], record["tokens"], record["task"]), []).append(record["runs"])
    asked: dict[tuple[str, int, str], list[list[dict[str, Any]]]] = {}
    for (part, length, _), members in sorted(cells.items()):
        if "right" in members[0]["full"]:
            asked.setdefault((part, length, EVERY), []).append(members)
    cells |= {cell: [runs for kind in kinds for runs in kind] for cell, kinds in asked.items() if len(kinds) > 1}
    found = []
    for (part, length, task), members in sorted(cells.items()):
        for name in {name: None for runs in members for name in runs}:
            row: dict[str, Any] = {"set": part, "tokens": length, "task": task, "policy": name}
            both = [runs for runs in members if name in runs]
            row |= {"documents": len(both), "kept": float(np.mean([runs[name]["kept"] for runs in both]))}
            for metric in ("right", "kl", "agreement") if both else ():
                if metric not in both[0][name]:
                    continue
                own = np.array([runs[name][metric] for runs in both], float)
                row[metric] = float(own.mean())
                for beside in (*BESIDE, *(name for name in AS_MANY_BYTES if all(name in runs for runs in both))):
                    other = np.array([runs[beside][metric] for runs in both], float)
                    row[f"{metric}_beside_{beside}"] = [
                        float(each[0]) for each in bootstrap_means((own - other)[:, None])
                    ]
            solved = [runs[name]["right"] for runs in both if runs["full"].get("right")]
            if solved:
                row |= {"solved": float(np.mean(solved)), "solved_documents": len(solved)}
            for metric in ("fetched", "key_bytes"):
                if metric in both[0][name]:
                    row[metric] = float(np.mean([runs[name][metric] for runs in both]))
            diagnosis = out / name / "diagnosis.json"
            found.append(row | (json.loads(diagnosis.read_text()) if diagnosis.exists() else {}))
    return found


def correlations(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each diagnosis with needles right and text KL, over the trained variations.

    Outcomes are means over a set's lengths and tasks, and over both sets', rounded so that as many right in another
    order are a tie. A row has None where the variations do not differ.
    """
    lines: list[dict[str, Any]] = []
    parts = {name: {name} for name in SETS} | (
        {"both sets": set(SETS)} if {row["set"] for row in found} == set(SETS) else {}
    )
    for part, sets in parts.items():
        for diagnosis in DIAGNOSES:
            members = [row for row in found if row["set"] in sets and diagnosis in row and row["task"] != EVERY]
            names = sorted({row["policy"] for row in members})
            if len(names) < 3:
                continue
            line: dict[str, Any] = {"set": part, "diagnosis": diagnosis, "variations": len(names)}
            for metric in ("right", "kl"):
                outcomes = [
                    [row[metric] for row in members if row["policy"] == name and metric in row] for name in names
                ]
                if not all(outcomes):
                    continue
                said = [next(row[diagnosis] for row in members if row["policy"] == name) for name in names]
                means = [round(float(np.mean(each)), 9) for each in outcomes]
                differ = len(set(said)) > 1 and len(set(means)) > 1
                line[metric] = float(spearmanr(said, means).statistic) if differ else None  # pyright: ignore[reportAttributeAccessIssue]
            lines.append(line)
    return lines


def ranked(rank: float | None, number: int) -> str:
    """Spearman's rank correlation over `number` independent pairs with an approximate 95 % interval.

    Fisher's z with the variance of Bonett and Wright 2000, "Sample size requirements for estimating Pearson, Kendall
    and Spearman correlations"; three pairs or fewer have no interval.
    """
    if rank is None:
        return "-"
    if number <= 3 or abs(rank) == 1:
        return f"{rank:+.2f}"
    half = 1.96 * math.sqrt((1 + rank**2 / 2) / (number - 3))
    low, high = (math.tanh(math.atanh(rank) + side * half) for side in (-1, 1))
    return f"{rank:+.2f} [{low:+.2f}, {high:+.2f}]"


def tables(found: list[dict[str, Any]]) -> str:
    """What is printed: questions, texts, then how diagnoses rank."""

    def differs(row: dict[str, Any], metric: str) -> list[str]:
        return ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[f"{metric}_beside_{beside}"]) for beside in BESIDE]

    counted = any("fetched" in row for row in found)
    head, parts = ["set", "tokens", "task", "variation", "n"], []
    for metric, named in (("right", ["right", "solved"]), ("kl", ["KL", "agreement"])):
        lines = [
            [row["set"], row["tokens"] or "-", row["task"], row["policy"], row["documents"], row[metric],
             row.get("agreement", row.get("solved", "-")), *differs(row, metric), f"{row['kept']:.1%}",
             *([row.get("fetched", "-"), row["key_bytes"] / 1e6 if "key_bytes" in row else "-"] if counted else []),
             *(row.get(name, "-") for name in DIAGNOSES)]
            for row in found if metric in row
        ]  # fmt: skip
        columns = [*head, *named, *(f"minus {beside}'s" for beside in BESIDE), "KV kept"]
        columns += [*(["chunks fetched a token", "keys to choose by, MB"] if counted else []), *DIAGNOSES]
        if lines:
            parts.append(str(Table(columns, lines)))
    foretold = [
        [line["set"], line["diagnosis"], line["variations"],
         *(ranked(line.get(metric), line["variations"]) for metric in ("right", "kl"))]
        for line in correlations(found)
    ]  # fmt: skip
    parts.append(str(Table(["set", "diagnosis", "variations", "rank: right", "rank: KL"], foretold)))
    return "\n\n".join(parts)
