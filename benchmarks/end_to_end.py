"""Answers and text at length under every policy, each cell of task and length with its differences by pairs.

    python -m benchmarks.end_to_end gemma-3-270m-long --bundle runs/long/bundle --out runs/long/answers \\
        --length 4096 --length 8192 --length 16384 --length 32768

Asks what the recipe's `benchmark:` section says, its tasks alone. Every cell keeps its answers in OUT/TASK-LENGTH, so a
stopped run continues, and several processes may each be given cells of their own (--task, --length); a last call with
all of them prints the tables and writes OUT/end_to_end.json. Accuracy is over all examples, and over those that full
attention answers; the indexer's lead over another policy is the mean difference on the same examples with a 95 %
bootstrap interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import origin
from data_gen.backbones.load import adapter, load_backbone
from data_gen.documents import heldout_share
from eval.decode.check import check_backbone
from eval.report import table
from eval.tasks.answers import Record, Runner
from eval.tasks.config import BenchmarkConfig
from eval.tasks.generated import generate_examples
from eval.tasks.haystack import Haystack
from eval.tasks.journal import Journal
from indexer_train.bridge.bundle import load_bundle
from indexer_train.intervals import bootstrap_means
from recipes import Recipe, load_recipe


def answer(recipe: Recipe, bundle: Path, lengths: list[int], config: BenchmarkConfig, out: Path) -> None:
    """Ask what is not answered yet."""
    wanted = {(task, length): config.texts if task == "text" else config.examples
              for length in lengths for task in config.tasks}  # fmt: skip
    if all(len(journal(out, bundle, *cell).records) >= count for cell, count in wanted.items()):
        return
    indexer = load_bundle(bundle)
    model, tokenizer = load_backbone(recipe.backbone)
    backbone, documents = adapter(model), recipe.documents
    check_backbone(indexer, backbone)
    haystack = Haystack(documents.source, documents.text_field, heldout_share(documents), tokenizer, max(lengths))
    runner = Runner(model, tokenizer, indexer, config, documents.thinking, backbone.info.context)
    examples = generate_examples(config, lengths, haystack, tokenizer, documents.thinking)
    for (task, length), count in wanted.items():
        kept = journal(out, bundle, task, length)
        names = [f"{task}-{length}-{index:04d}" for index in range(count)]
        for name in tqdm([name for name in names if name not in kept.records], f"{task} {length}"):
            kept.add(runner.run(examples[name]()))


def journal(out: Path, bundle: Path, task: str, length: int) -> Journal:
    """The answers of one cell; those of another bundle are refused."""
    return Journal(
        out / f"{task}-{length}" / "answers.jsonl", {"bundle": json.loads((bundle / "bundle.json").read_text())}
    )


def rows(records: list[Record], cell: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per policy and budget: means over the records with intervals, and the indexer's lead."""
    metrics = ("kl", "agreement") if cell["task"] == "text" else ("score",)
    solved = np.array([record["runs"][0].get("score", 1.0) >= 1 for record in records])
    runs: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for record in records:
        for run in record["runs"]:
            runs.setdefault((run["policy"], run["budget"]), []).append(run)
    found = []
    for (policy, budget), members in runs.items():
        row = cell | {"policy": policy, "budget": budget, "examples": len(members), "solved": int(solved.sum())}
        row |= {name: float(np.mean([run[name] for run in members])) for name in ("kept", "chunks")}
        row["kv_mb"] = float(np.mean([run["kv_bytes"] for run in members])) / 1e6
        ours = runs.get(("indexer", budget), members)
        for metric in metrics:
            own, lead = (np.array([run[metric] for run in each], float) for each in (members, ours))
            row[metric] = interval(own)
            row[f"{metric}_lead"] = interval(lead - own)
            if metric == "score":
                row |= {"score_of_solved": interval(own[solved]), "lead_of_solved": interval((lead - own)[solved])}
        found.append(row)
    return found


def interval(values: np.ndarray) -> list[float | None]:
    """[mean, low, high]; None where there is none."""
    bounds = [float(each[0]) for each in bootstrap_means(values[:, None])] if len(values) else [np.nan] * 3
    return [None if np.isnan(bound) else bound for bound in bounds]


def tables(found: list[dict[str, Any]]) -> str:
    """What is printed: answers, then text."""

    def cells(row: dict[str, Any], *names: str) -> list[str]:
        return ["-" if row[name][0] is None else f"{row[name][0]:.3f} [{row[name][1]:+.3f}, {row[name][2]:+.3f}]"
                if row[name][1] is not None else f"{row[name][0]:.3f}" for name in names]  # fmt: skip

    def lines(kind: bool, *names: str) -> list[list[Any]]:
        return [
            [f"{row['length']:,}", row["task"], row["policy"], row["budget"], row["examples"], row["solved"],
             *cells(row, *names), f"{row['kept']:.1%}", row["kv_mb"]]
            for row in found if (row["task"] == "text") == kind
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
    parser.add_argument("recipe")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, action="append", required=True)
    parser.add_argument("--task", action="append", help="of the recipe's, all of them by default")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    config = recipe.benchmark.changed([], tasks=arguments.task)
    answer(recipe, arguments.bundle, arguments.length, config, arguments.out)
    found = []
    for length in arguments.length:
        for task in config.tasks:
            records = list(journal(arguments.out, arguments.bundle, task, length).records.values())
            found += rows(records, {"task": task, "length": length}) if records else []
    print(tables(found))
    report = {"origin": origin("cuda" if torch.cuda.is_available() else "cpu"), "rows": found}
    (arguments.out / "end_to_end.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
