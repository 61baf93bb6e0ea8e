"""Accuracy of a trained pocket model by task and length: `python -m recipes.pocket_v4.evaluate FOLDER`.

Uses the stock class and its stock attention; sparse attention as trained (`topk`), open to every entry (`open`) and
closed (`closed`: sliding window and heavily compressed attention only).
"""

import argparse
import json
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from recipes.pocket_v4.attention import NAME, no_mask
from recipes.pocket_v4.config import PocketConfig, load_config
from recipes.pocket_v4.model import OPEN, set_topk
from recipes.pocket_v4.tasks import TASKS, Document, solved_forced, test_document
from recipes.pocket_v4.words import build_lexicon


def documents_of(config: PocketConfig, task: str, length: int, count: int) -> list[Document]:
    """The first `count` test documents of a task at a length; training never draws from this seed."""
    lexicon = build_lexicon(config.vocabulary)
    rng = Random(f"test/{task}/{length}")
    distractors = min(config.evaluation.distractors, length // 32)
    return [test_document(lexicon, task, length, distractors, rng) for _ in range(count)]


@torch.inference_mode()
def predict(model: DeepseekV4ForCausalLM, tokens: Tensor) -> Tensor:
    """Best next token at every position. tokens, result: [B, L]."""
    banded = model.config._attn_implementation == NAME
    mask = no_mask(*tokens.shape, tokens.device) if banded else None
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.argmax(-1)


def accuracy(
    model: DeepseekV4ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: PocketConfig,
    task: str,
    length: int,
    documents: int,
) -> float:
    """Share of test documents whose whole answer is right, from one forward pass each (see tasks.solved_forced)."""
    tests = documents_of(config, task, length, documents)
    right = 0
    size = max(1, config.evaluation.tokens // length)
    for start in range(0, documents, size):
        batch = tests[start : start + size]
        tokens = tokenizer([f"{d.prompt} {d.answer}" for d in batch], return_tensors="pt").input_ids.to(model.device)
        for document, row in zip(batch, predict(model, tokens), strict=True):
            answer = len(document.answer.split())
            predicted = tokenizer.convert_ids_to_tokens(row[-answer - 1 : -1].tolist())
            right += solved_forced(document, predicted)
    return right / documents


def table(folder: Path, config: PocketConfig) -> dict[str, dict[int, dict[str, float]]]:
    """Accuracy by setting, length and task."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for setting, topk in {"topk": model.config.index_topk, "open": OPEN, "closed": 0}.items():
        set_topk(model, topk)
        results[setting] = {}
        for length in config.evaluation.lengths:
            count = config.evaluation.documents
            row = {task: accuracy(model, tokenizer, config, task, length, count) for task in TASKS}
            results[setting][length] = row
            print(setting, length, row, flush=True)
    return results


def main() -> None:
    """Print the table and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    args = parser.parse_args()
    args.out.write_text(json.dumps(table(args.folder, load_config(args.config)), indent=1) + "\n")


if __name__ == "__main__":
    main()
