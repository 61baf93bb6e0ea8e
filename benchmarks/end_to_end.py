"""Answers and text at length under every policy, each cell of task and length with its differences by pairs.

    python -m benchmarks.end_to_end gemma-3-270m-long --bundle runs/long/bundle --out runs/long/answers \\
        --length 4096 --length 8192 --length 16384 --length 32768 [--task single ...]
    python -m benchmarks.end_to_end --out runs/long/answers

Asks what the recipe's `benchmark:` section says, its tasks alone, about text that the bundle's training held out. Every
cell keeps its answers in OUT/TASK-LENGTH, so a stopped run continues, and several processes may each be given cells of
their own. Then, or at once where no recipe is given, prints the tables of all answers in OUT and writes
OUT/end_to_end.json, with where the answers were made. Accuracy is over all examples, and over those that full attention
answers; the indexer's lead over another policy under the same budget is the mean difference on the same examples with a
95 % bootstrap interval.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.machine import origin
from data_gen.backbones.load import adapter, load_backbone
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from eval.online.answers import Record, Runner
from eval.online.benchmark import answer_settings, trained_documents, unseen_text
from eval.online.check import check_backbone
from eval.online.config import BenchmarkConfig
from eval.online.generated import generate_examples
from eval.online.journal import Journal
from eval.report.tables import table
from indexer_train.formats.bundle import load_bundle
from indexer_train.measure.intervals import bootstrap_means
from recipes import Recipe, load_recipe

ANSWERS = "answers.jsonl"
NONE: list[float | None] = [None, None, None]


def answer(recipe: Recipe, bundle: Path, lengths: list[int], config: BenchmarkConfig, out: Path) -> None:
    """Ask what is not answered yet. Raises InputError for lengths beyond the context."""
    indexer = load_bundle(bundle)
    model, tokenizer = load_backbone(recipe.backbone)
    backbone, documents = adapter(model), trained_documents(indexer)
    check_backbone(indexer, backbone)
    context = backbone.info.context
    if max(lengths) > context:
        raise InputError(f"--length {max(lengths)}: the backbone's context is {context} tokens")
    haystack = unseen_text(config, documents, tokenizer, context)  # whatever is asked, the same examples
    thinking = documents is not None and documents.thinking
    runner = Runner(model, tokenizer, indexer, config, thinking, context)
    examples = generate_examples(config, lengths, haystack, tokenizer, thinking)
    settings, made = answer_settings(runner, haystack), origin(model.device)
    for length in lengths:
        for task in config.tasks:
            count = config.texts if task == "text" else config.examples
            names = [f"{task}-{length}-{index:04d}" for index in range(count)]
            journal = Journal(out / f"{task}-{length}" / ANSWERS, settings)
            for name in tqdm([name for name in names if name not in journal.records], f"{task} {length}"):
                journal.add(runner.run(examples[name]()) | {"origin": made})


def answered(out: Path) -> dict[tuple[str, int], list[Record]]:
    """The records of every (task, length) in `out`. Raises InputError where there is none, or of different settings."""
    found: dict[tuple[str, int], list[Record]] = {}
    headers: dict[str, Path] = {}
    for path in sorted(out.glob(f"*/{ANSWERS}")):
        whole = path.read_text()
        lines = whole[: whole.rfind("\n") + 1].splitlines()  # another process may be writing
        if not lines:
            continue
        header, *lines = lines
        headers.setdefault(header, path)
        for record in map(json.loads, lines):
            found.setdefault((record["task"], record["length"]), []).append(record)
    if len(headers) > 1:
        raise InputError(
            f"{' and '.join(str(path) for path in headers.values())} hold answers under different settings"
        )
    if not found:
        raise InputError(f"{out}: no answers there; ask with a recipe and --bundle")
    return dict(sorted(found.items(), key=lambda cell: cell[0][::-1]))


def rows(records: Sequence[Record], task: str, length: int) -> list[dict[str, Any]]:
    """A row per policy and budget: [mean, low, high] over the records of each metric and of the indexer's lead.

    A lead is None where the indexer has no run of that budget, as over policies that know none. left_out: records
    without an answer, which no figure counts; solved: those that full attention answers.
    """
    metrics = ("kl", "agreement") if task == "text" else ("score",)
    answers = [record for record in records if record["runs"]]
    runs: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for record in answers:
        for run in record["runs"]:
            runs.setdefault((run["policy"], run["budget"]), []).append(run)
    solved = np.array([record["runs"][0].get("score", 1.0) >= 1 for record in answers])
    found = []
    for (policy, budget), members in runs.items():
        row = {"task": task, "length": length, "policy": policy, "budget": budget, "examples": len(members)}
        row |= {"left_out": len(records) - len(answers), "solved": int(solved.sum())}
        row |= {name: float(np.mean([run[name] for run in members])) for name in ("kept", "chunks")}
        row["kv_mb"] = float(np.mean([run["kv_bytes"] for run in members])) / 1e6
        ours = None if policy == "indexer" else runs.get(("indexer", budget))
        for metric in metrics:
            own = np.array([run[metric] for run in members], float)
            lead = None if ours is None else np.array([run[metric] for run in ours], float) - own
            row |= {metric: interval(own), f"{metric}_lead": NONE if lead is None else interval(lead)}
            if metric == "score":
                row["score_of_solved"] = interval(own[solved])
                row["lead_of_solved"] = NONE if lead is None else interval(lead[solved])
        found.append(row)
    return found


def interval(values: np.ndarray) -> list[float | None]:
    """[mean, low, high] by a bootstrap over `values`; None where there is none."""
    if not len(values):
        return NONE
    bounds = [float(each[0]) for each in bootstrap_means(values[:, None])]
    return [None if np.isnan(bound) else bound for bound in bounds]


def tables(found: list[dict[str, Any]]) -> str:
    """What is printed: answers, then text."""

    def cell(value: list[float | None]) -> str:
        mean, low, high = value
        if mean is None:
            return "-"
        return f"{mean:.3f}" if low is None else f"{mean:.3f} [{low:+.3f}, {high:+.3f}]"

    def lines(text: bool, *names: str) -> list[list[Any]]:
        return [
            [f"{row['length']:,}", row["task"], row["policy"], row["budget"], row["examples"], row["solved"],
             *(cell(row[name]) for name in names), f"{row['kept']:.1%}", row["kv_mb"]]
            for row in found if (row["task"] == "text") == text
        ]  # fmt: skip

    head = ["tokens", "task", "policy", "budget", "n", "solved"]
    tail = ["KV kept", "KV MB"]
    answers = table([*head, "right", "right of solved", "indexer's lead", "lead of solved", *tail],
                    lines(False, "score", "score_of_solved", "score_lead", "lead_of_solved"))  # fmt: skip
    text = table([*head, "KL", "agreement", "indexer's KL minus its", *tail], lines(True, "kl", "agreement", "kl_lead"))
    return f"{answers}\n\n{text}"


def main() -> None:
    """Answer what is missing, print the tables; OUT/end_to_end.json holds every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="without one nothing is asked")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--task", action="append", help="of the recipe's, all of them by default")
    arguments = parser.parse_args()
    if arguments.recipe and not (arguments.bundle and arguments.length):
        parser.error("a recipe needs --bundle and --length")
    try:
        if arguments.recipe:
            recipe = load_recipe(arguments.recipe)
            config = recipe.benchmark.changed([], tasks=arguments.task)
            answer(recipe, arguments.bundle, arguments.length, config, arguments.out)
        cells = answered(arguments.out)
    except InputError as error:
        parser.error(str(error))
    found = [row for (task, length), records in cells.items() for row in rows(records, task, length)]
    print(tables(found))
    made = {json.dumps(record["origin"]): record["origin"] for records in cells.values() for record in records}
    report = json.dumps({"origins": list(made.values()), "rows": found}, indent=1)
    write_atomically(arguments.out / "end_to_end.json", lambda path: path.write_text(report + "\n"))


if __name__ == "__main__":
    main()
