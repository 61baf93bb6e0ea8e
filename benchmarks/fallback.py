"""Demand fallback on a trained model: full attention, a cap, and the cap with fallback, on dense and sparse questions.

    python -m benchmarks.fallback --bundle runs/pocket/demand/bundle

Texts of the pocket language (recipes/pocket_v4), each asked a dense question, `copy` (all six steps, scattered over the
text), and a sparse one, `multi_key` (one note among many). The threshold and the coverage by which a window's demand is
counted are calibrated on sparse questions of other texts: a share `rate` of those may fall back. Last rows have the
rules that the bundle carries, calibrated for a share of the chunks. Every window of a question holds its whole answer.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.machine import origin
from data_gen.backbones.load import load_backbone, resolve
from data_gen.config import BackboneConfig
from data_gen.core.files import write_atomically
from eval.online.online_policies import calibrated, indexer_policy
from eval.online.session import open_session
from eval.online.summary import wilson
from eval.report.tables import Table
from eval.runtime.runtime import LSARuntime
from eval.serving.select import Fallback, Limits
from indexer_train.formats.bundle import load_bundle
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import remaining
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from recipes.pocket.config import load_config
from recipes.pocket.tasks import PocketDocument, solved, test_documents
from recipes.pocket.words import build_lexicon

DENSE, SPARSE = "copy", "multi_key"
POCKET = "package:recipes/pocket_v4"


def questions(length: int, count: int, seed: str) -> list[PocketDocument]:
    """`count` texts of `length` tokens, a dense and a sparse question on each."""
    config, rng = load_config(Path(resolve(f"{POCKET}/config.yaml"))), Random(seed)
    lexicon, others = build_lexicon(config.vocabulary), min(config.evaluation.distractors, length // 64)
    return [each for _ in range(count) for each in test_documents(lexicon, [DENSE, SPARSE], length, others, rng)]


def separating(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indexer: MemoryIndexer, asked: list[PocketDocument],
    cap: int, rate: float,
) -> tuple[Threshold, Coverage]:  # fmt: skip
    """The rules with which a share `rate` of the questions asks for more than `cap` chunks, the protected included."""
    first_beyond = []
    for question in tqdm(asked, "calibrating", leave=False):
        session = open_session(model, indexer.spec)
        session.read(tokenizer(question.prompt).input_ids[:-1])
        first, last = indexer.spec.chunking.candidates(session.position)
        free = cap - (indexer.spec.chunking.visible(session.position) - (last - first))
        scores = indexer_policy(indexer)(session)[None, first:last]
        rest = remaining(scores, torch.ones_like(scores, dtype=torch.bool))
        first_beyond.append([float(of[0].sort(descending=True).values[free]) for of in (scores, rest)])
    score, rest = torch.tensor(first_beyond, dtype=torch.float64).quantile(1 - rate, dim=0).tolist()
    return Threshold(cuts=[Cut(score=score)]), Coverage(share=1 - rest)


def answered(
    runtime: LSARuntime, tokenizer: PreTrainedTokenizerBase, asked: list[PocketDocument]
) -> Iterator[tuple[PocketDocument, bool]]:
    """(question, whether its greedy answer is right); the runtime's windows are those of this question."""
    for question in asked:
        ids = tokenizer(question.prompt, return_tensors="pt").input_ids.to(runtime.model.device)
        most = len(question.answer.split())
        runtime.reset()
        written = runtime.generate(ids, max_new_tokens=most, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        yield question, solved(question, str(tokenizer.decode(written)))


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indexer: MemoryIndexer, asked: list[PocketDocument],
    cap: int, threshold: Threshold, coverage: Coverage,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per setting and task.

    right of questions with a 95 % Wilson interval; fallbacks of windows; demand: median of chunks asked for;
    resident_share: of the chunks; bytes_per_token: of resident chunks beside the model, per token of the context.
    """
    limits = Limits(floor=cap, cap=cap)  # the cap is reserved in any case
    settings = {
        "full attention": LSARuntime(indexer, model, selection=Budget(budget=1.0)),
        "cap": LSARuntime(indexer, model, limits, threshold),
        "cap + fallback": LSARuntime(indexer, model, limits, threshold, Fallback()),
        "cap + fallback by coverage": LSARuntime(indexer, model, limits, coverage, Fallback()),
    }
    for by in ("threshold", "coverage"):
        if (own := calibrated(indexer, by)) is not None:
            settings[f"cap + fallback, bundle's {by}"] = LSARuntime(indexer, model, limits, own, Fallback())
    rows = []
    for name, runtime in settings.items():
        right: dict[str, list[bool]] = {DENSE: [], SPARSE: []}
        windows: dict[str, list[Any]] = {DENSE: [], SPARSE: []}
        for question, correct in tqdm(answered(runtime, tokenizer, asked), name, len(asked), leave=False):
            right[question.task].append(correct)
            windows[question.task] += runtime.windows
        for task, of in windows.items():
            low, high = wilson(sum(right[task]), len(right[task]))
            rows.append(
                {
                    "setting": name,
                    "task": task,
                    "right": sum(right[task]),
                    "questions": len(right[task]),
                    "low": low,
                    "high": high,
                    "fallbacks": sum("full" in window.served for window in of),
                    "windows": len(of),
                    "demand": statistics.median(window.demand[0] for window in of),
                    "resident_share": sum(window.resident for window in of) / sum(window.chunks for window in of),
                    "bytes_per_token": statistics.fmean(window.bytes / (window.position + 1) for window in of),
                }
            )
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        [
            row["setting"],
            row["task"],
            f"{row['right']} of {row['questions']} [{row['low']:.0%}-{row['high']:.0%}]",
            f"{row['fallbacks']} of {row['windows']}",
            f"{row['demand']:.0f}",
            f"{row['resident_share']:.1%}",
            f"{row['bytes_per_token']:.0f}",
        ]
        for row in rows
    ]
    return str(
        Table(["", "task", "right", "windows fallen back", "median demand", "chunks resident", "bytes a token"], lines)
    )


def main() -> None:
    """Measure, print a table, and write it where --output says."""
    parser = argparse.ArgumentParser(description="Demand fallback on a trained model, on dense and sparse questions.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=8, help="texts; as many others calibrate")
    parser.add_argument("--cap", type=int, default=8, help="resident chunks, the protected included")
    parser.add_argument("--rate", type=float, default=0.1, help="share of sparse questions that may fall back")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load_backbone(BackboneConfig(path=f"{POCKET}/model"))
    indexer = load_bundle(arguments.bundle)
    others = [each for each in questions(arguments.length, arguments.count, "calibration") if each.task == SPARSE]
    rules = separating(model, tokenizer, indexer, others, arguments.cap, arguments.rate)
    asked = questions(arguments.length, arguments.count, "asked")
    rows = measure(model, tokenizer, indexer, asked, arguments.cap, *rules)
    print(f"{arguments.length} tokens, cap {arguments.cap} chunks, {' and '.join(map(str, rules))}\n{as_table(rows)}")
    if arguments.output:
        found = {"bundle": indexer.spec.model_dump(mode="json", include={"chunking", "selections", "backbone"})}
        found |= {"length": arguments.length, "cap": arguments.cap, "rate": arguments.rate, "rows": rows}
        found |= {rule.by: rule.model_dump(mode="json") for rule in rules} | origin(model.device)
        write_atomically(arguments.output, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))


if __name__ == "__main__":
    main()
