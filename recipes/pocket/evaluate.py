"""Measures a trained pocket model, length by length.

Settings: sparse attention as trained (`topk`), open to every entry (`open`) and, where the architecture has other
attention beside it, closed (`closed`).
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.pocket.config import PocketConfig
from recipes.pocket.family import OPEN, Model, PocketFamily, hardware
from recipes.pocket.reading import Reading, recall
from recipes.pocket.tasks import TASKS, PocketDocument, solved, test_documents
from recipes.pocket.words import build_lexicon


def documents_of(config: PocketConfig, task: str, length: int, count: int) -> list[PocketDocument]:
    """The first `count` test documents of a task at a length; training never draws from this seed."""
    lexicon = build_lexicon(config.vocabulary)
    rng = Random(f"test/{task}/{length}")
    distractors = min(config.evaluation.distractors, length // 32)
    return [test_documents(lexicon, [task], length, distractors, rng)[0] for _ in range(count)]


@torch.inference_mode()
def predict(family: PocketFamily, model: Model, tokens: Tensor) -> Tensor:
    """Best next token at every position, tokens, result: [B, L]."""
    return family.logits(model, tokens).argmax(-1)


def greedy(family: PocketFamily, model: Model, tokens: Tensor, count: int) -> Tensor:
    """Words that greedy decoding puts in place of the last `count` of tokens [B, L]: [B, count]. A pass over the whole
    text settles at least one word more, and all at once where the last ones are what the model says anyway."""
    tokens = tokens.clone()
    for _ in range(count):
        written = predict(family, model, tokens)[:, -count - 1 : -1]
        if torch.equal(written, tokens[:, -count:]):
            break
        tokens[:, -count:] = written
    return tokens[:, -count:]


def batches(
    tokenizer: PreTrainedTokenizerFast, documents: list[PocketDocument], size: int
) -> Iterator[tuple[list[PocketDocument], Tensor, slice]]:
    """Documents of one task and length with their tokens [B, L] and the rows that predict the answer."""
    rows = slice(-len(documents[0].answer.split()) - 1, -1)
    for start in range(0, len(documents), size):
        batch = documents[start : start + size]
        yield batch, tokenizer([f"{d.prompt} {d.answer}" for d in batch], return_tensors="pt").input_ids, rows


def accuracy(
    family: PocketFamily, model: Model, tokenizer: PreTrainedTokenizerFast, documents: list[PocketDocument], size: int
) -> float:
    """Share of documents whose whole answer is right, decoded greedily: the right answer before a word would tell which
    of several values are still due, and a model that always says the same one would often be right."""
    right, count = 0, len(documents[0].answer.split())
    for batch, tokens, _ in batches(tokenizer, documents, size):
        answers = tokenizer.batch_decode(greedy(family, model, tokens.to(model.device), count))
        right += sum(solved(document, answer) for document, answer in zip(batch, answers, strict=True))
    return right / len(documents)


def readings(
    family: PocketFamily, model: Model, tokenizer: PreTrainedTokenizerFast, documents: list[PocketDocument], size: int
) -> list[Reading]:
    """What the indexers' best entries hold of the answer rows' attention mass, were every entry attended to."""
    family.set_topk(model, OPEN)
    found: list[Reading] = []
    for _, tokens, rows in batches(tokenizer, documents, size):
        answers = torch.zeros(tokens.shape, dtype=torch.bool, device=model.device)
        answers[:, rows] = True
        with family.probe(model, model.config.index_topk, 0.5, answers) as probe:
            predict(family, model, tokens.to(model.device))
        found += probe.readings
    return found


def open_recall(
    family: PocketFamily,
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    tests: dict[str, list[PocketDocument]],
    size: int,
) -> float:
    """The indexers' recall of attention mass over the documents of every task, with sparse attention open."""
    return recall(
        [one for documents in tests.values() for one in readings(family, model, tokenizer, documents, size)]
    ).item()


def measure(
    family: PocketFamily, model: Model, tokenizer: PreTrainedTokenizerFast, config: PocketConfig, length: int
) -> dict[str, object]:
    """One length: accuracy by setting and task, the indexer's recall, and the seconds it took."""
    started = time.monotonic()
    plan = config.evaluation
    size = max(1, plan.tokens // length)
    tests = {task: documents_of(config, task, length, plan.documents) for task in TASKS}
    row: dict[str, object] = {}
    settings = {"topk": (model.config.index_topk, plan.documents), "open": (OPEN, plan.comparisons)}
    if family.closed is not None:
        settings["closed"] = 0, plan.comparisons
    for setting, (topk, count) in settings.items():
        family.set_topk(model, topk)
        row[setting] = {task: accuracy(family, model, tokenizer, tests[task][:count], size) for task in TASKS}
    few = max(1, plan.comparisons // len(TASKS))
    found = open_recall(family, model, tokenizer, {task: tests[task][:few] for task in TASKS}, size)
    return row | {"recall": found, "seconds": round(time.monotonic() - started, 1)}


def weights_digest(folder: Path) -> str:
    """SHA-256 of the folder's weights: ties figures to what they were measured on."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def evaluate(family: PocketFamily, folder: Path, config: PocketConfig, out: Path) -> None:
    """Measure every length; print and write each to `out` as it is done, so that a run cut short leaves what it has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = family.load(folder)
    nn.Module.to(model, device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = config.evaluation
    lengths: dict[int, dict[str, object]] = {}
    report = {"weights": weights_digest(folder), "hardware": hardware(device)}
    report |= {"documents": plan.documents, "comparisons": plan.comparisons, "lengths": lengths}
    for length in plan.lengths:
        lengths[length] = measure(family, model, tokenizer, config, length)
        print(length, json.dumps(lengths[length]), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
