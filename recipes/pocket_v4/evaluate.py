"""Measures a trained pocket model: `python -m recipes.pocket_v4.evaluate FOLDER`.

Writes FOLDER/evaluation.json, length by length, and the model card, or with --out that file alone. Settings: sparse
attention as trained (`topk`), open to every entry (`open`) and closed (`closed`: sliding window and heavily compressed
attention only).
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from recipes.pocket_v4.attention import NAME, no_mask
from recipes.pocket_v4.card import write_card
from recipes.pocket_v4.config import PocketConfig, load_config
from recipes.pocket_v4.indexer import IndexerProbe, Reading, recall
from recipes.pocket_v4.model import OPEN, hardware, set_topk
from recipes.pocket_v4.tasks import TASKS, PocketDocument, solved_forced, test_documents
from recipes.pocket_v4.words import build_lexicon


def documents_of(config: PocketConfig, task: str, length: int, count: int) -> list[PocketDocument]:
    """The first `count` test documents of a task at a length; training never draws from this seed."""
    lexicon = build_lexicon(config.vocabulary)
    rng = Random(f"test/{task}/{length}")
    distractors = min(config.evaluation.distractors, length // 32)
    return [test_documents(lexicon, [task], length, distractors, rng)[0] for _ in range(count)]


@torch.inference_mode()
def predict(model: DeepseekV4ForCausalLM, tokens: Tensor) -> Tensor:
    """Best next token at every position, by a model with the `pocket` attention. tokens, result: [B, L]."""
    mask = no_mask(len(tokens), tokens.shape[1], tokens.device)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.argmax(-1)


def batches(
    tokenizer: PreTrainedTokenizerFast, documents: list[PocketDocument], size: int
) -> Iterator[tuple[list[PocketDocument], Tensor, slice]]:
    """Documents of one task and length with their tokens [B, L] and the rows that predict the answer."""
    rows = slice(-len(documents[0].answer.split()) - 1, -1)
    for start in range(0, len(documents), size):
        batch = documents[start : start + size]
        yield batch, tokenizer([f"{d.prompt} {d.answer}" for d in batch], return_tensors="pt").input_ids, rows


def accuracy(
    model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[PocketDocument], size: int
) -> float:
    """Share of documents whose whole answer is right, from one forward pass each (see tasks.solved_forced)."""
    right = 0
    for batch, tokens, rows in batches(tokenizer, documents, size):
        predicted = predict(model, tokens.to(model.device))[:, rows].tolist()
        answers = [[str(tokenizer.convert_ids_to_tokens(word)) for word in words] for words in predicted]
        right += sum(solved_forced(document, answer) for document, answer in zip(batch, answers, strict=True))
    return right / len(documents)


def readings(
    model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[PocketDocument], size: int
) -> list[Reading]:
    """What the indexers' best entries hold of the answer rows' attention mass, were every entry attended to."""
    set_topk(model, OPEN)
    found: list[Reading] = []
    for _, tokens, rows in batches(tokenizer, documents, size):
        answers = torch.zeros(tokens.shape, dtype=torch.bool, device=model.device)
        answers[:, rows] = True
        with IndexerProbe(model, model.config.index_topk, 0.5, answers) as probe:
            predict(model, tokens.to(model.device))
        found += probe.readings
    return found


def open_recall(
    model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, tests: dict[str, list[PocketDocument]], size: int
) -> float:
    """The indexers' recall of attention mass over the documents of every task, with sparse attention open."""
    return recall([one for documents in tests.values() for one in readings(model, tokenizer, documents, size)]).item()


def measure(
    model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: PocketConfig, length: int
) -> dict[str, object]:
    """One length: accuracy by setting and task, the indexer's recall, and the seconds it took."""
    started = time.monotonic()
    plan = config.evaluation
    size = max(1, plan.tokens // length)
    tests = {task: documents_of(config, task, length, plan.documents) for task in TASKS}
    row: dict[str, object] = {}
    for setting, (topk, count) in {
        "topk": (model.config.index_topk, plan.documents),
        "open": (OPEN, plan.comparisons),
        "closed": (0, plan.comparisons),
    }.items():
        set_topk(model, topk)
        row[setting] = {task: accuracy(model, tokenizer, tests[task][:count], size) for task in TASKS}
    few = max(1, plan.comparisons // len(TASKS))
    found = open_recall(model, tokenizer, {task: tests[task][:few] for task in TASKS}, size)
    return row | {"recall": found, "seconds": round(time.monotonic() - started, 1)}


def weights_digest(folder: Path) -> str:
    """SHA-256 of the folder's weights: ties figures to what they were measured on."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def evaluate(folder: Path, config: PocketConfig, out: Path) -> None:
    """Measure every length; print and write each to `out` as it is done, so that a run cut short leaves what it has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=NAME, experts_implementation=NAME
    )
    nn.Module.to(model, device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plan = config.evaluation
    lengths: dict[int, dict[str, object]] = {}
    report = {"weights": weights_digest(folder), "hardware": hardware(device)}
    report |= {"documents": plan.documents, "comparisons": plan.comparisons, "lengths": lengths}
    for length in plan.lengths:
        lengths[length] = measure(model, tokenizer, config, length)
        print(length, json.dumps(lengths[length]), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Measure a model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="as written by recipes.pocket_v4.train")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of the recipe's; with --out")
    parser.add_argument("--documents", type=int, help="of a task and length, instead of the recipe's; with --out")
    parser.add_argument("--out", type=Path, help="file for the figures; the folder is left as it is")
    args = parser.parse_args()
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder}: no model there (config.json is missing)")
    if args.out is None and (args.lengths or args.documents):
        parser.error("--lengths and --documents measure a part: name a file for it with --out")
    config = load_config(args.config)
    plan = config.evaluation
    plan.lengths, plan.documents = args.lengths or plan.lengths, args.documents or plan.documents
    plan.comparisons = min(plan.comparisons, plan.documents)
    evaluate(args.folder, config, args.out or args.folder / "evaluation.json")
    if args.out is None:
        write_card(args.folder)


if __name__ == "__main__":
    main()
