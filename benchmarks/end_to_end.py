"""Answers and text at length under every policy, each cell of task and length with its differences by pairs.

    python -m benchmarks.end_to_end gemma-3-270m-long --bundle runs/long/bundle --out runs/long/answers \\
        --length 4096 --length 8192 --length 16384 --length 32768 [--task single ...]
    python -m benchmarks.end_to_end --out runs/long/answers

Asks what the recipe's `benchmark:` section says, its tasks alone, about text that the bundle's training held out. Every
cell keeps its answers in OUT/TASK-LENGTH, so a stopped run continues, and several processes may each be given cells of
their own. Then, or at once where no recipe is given, prints the tables of all answers in OUT and writes
OUT/end_to_end.json, with where the answers were made. Accuracy is over all examples, and over those that full attention
answers, with a 95 % interval: Wilson's where every score is 0 or 1, else a bootstrap. The indexer's lead over another
policy under the same budget is the mean difference on the same examples with a 95 % bootstrap interval.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import origin
from data_gen.backbones.load import adapter, load_backbone
from data_gen.core.errors import InputError
from data_gen.core.files import write_atomically
from eval.online.benchmark import JOURNAL, answer_settings, open_runner, trained_documents, unseen_text
from eval.online.config import BenchmarkConfig
from eval.online.generated import generate_examples
from eval.online.records import Journal, Record, read_journal
from eval.online.summary import LeadRow, lead_rows
from eval.report.tables import table
from indexer_train.formats.bundle import load_bundle
from recipes import Recipe, load_recipe


def answer(recipe: Recipe, bundle: Path, lengths: list[int], config: BenchmarkConfig, out: Path) -> None:
    """Ask what is not answered yet. Raises InputError for lengths beyond the context."""
    indexer = load_bundle(bundle)
    model, tokenizer = load_backbone(recipe.backbone)
    backbone = adapter(model)
    runner, context = open_runner(backbone, tokenizer, indexer, config), backbone.info.context
    if max(lengths) > context:
        raise InputError(f"--length {max(lengths)}: the backbone's context is {context} tokens")
    haystack = unseen_text(config, trained_documents(indexer), tokenizer, context)  # whatever is asked, the same
    examples = generate_examples(config, lengths, haystack, tokenizer, runner.thinking)
    settings, made = answer_settings(runner, config, haystack), origin(model.device)
    for length in lengths:
        for task in config.tasks:
            count = config.texts if task == "text" else config.examples
            names = [f"{task}-{length}-{index:04d}" for index in range(count)]
            journal = Journal(out / f"{task}-{length}" / JOURNAL, settings)
            for name in tqdm([name for name in names if name not in journal.records], f"{task} {length}"):
                journal.add(runner.run(examples[name]()).model_copy(update={"origin": made}))


def answered(out: Path) -> dict[tuple[str, int], list[Record]]:
    """The records of every (task, length) in `out`. Raises InputError where there is none, or of different settings."""
    found: dict[tuple[str, int], list[Record]] = {}
    headers: dict[str, Path] = {}
    for path in sorted(out.glob(f"*/{JOURNAL}")):
        settings, records = read_journal(path)
        if settings:
            headers.setdefault(json.dumps(settings), path)
        for record in records:
            found.setdefault((record.task, record.length or 0), []).append(record)
    if len(headers) > 1:
        raise InputError(
            f"{' and '.join(str(path) for path in headers.values())} hold answers under different settings"
        )
    if not found:
        raise InputError(f"{out}: no answers there; ask with a recipe and --bundle")
    return dict(sorted(found.items(), key=lambda cell: cell[0][::-1]))


def tables(found: Sequence[LeadRow]) -> str:
    """What is printed: answers, then text."""

    def cell(value: tuple[float | None, ...]) -> str:
        mean, low, high = value
        if mean is None:
            return "-"
        return f"{mean:.3f}" if low is None else f"{mean:.3f} [{low:+.3f}, {high:+.3f}]"

    def lines(text: bool, *names: str) -> list[list[Any]]:
        return [
            [f"{row.length:,}", row.task, row.policy, row.budget, row.examples, row.solved,
             *(cell(getattr(row, name)) for name in names), f"{row.kept:.1%}", row.kv_mb]
            for row in found if (row.task == "text") == text
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
    found = [row for (task, length), records in cells.items() for row in lead_rows(records, task, length)]
    print(tables(found))
    made = {json.dumps(record.origin): record.origin for records in cells.values() for record in records}
    rows = [row.model_dump(mode="json", exclude_unset=True) for row in found]
    report = json.dumps({"origins": list(made.values()), "rows": rows}, indent=1)
    write_atomically(arguments.out / "end_to_end.json", lambda path: path.write_text(report + "\n"))


if __name__ == "__main__":
    main()
