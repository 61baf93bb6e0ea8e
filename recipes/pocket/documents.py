"""Files for the toolkit: chats to trace, and tests in RULER's format.

    python -m recipes.pocket.documents recipes/pocket_v4 --out X

X/chats.jsonl: the training language, each answer a message of its own; X/tests/TASK-LENGTH.jsonl: questions at the end
of texts of LENGTH tokens. No test document is among the model's or the indexer's training documents.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from random import Random

from recipes.pocket.config import PocketConfig, load_config
from recipes.pocket.tasks import test_documents, training_document
from recipes.pocket.words import Lexicon, build_lexicon

ASKED = ("multi_key", "multi_value", "tracking", "copy")
Message = dict[str, str]


def chat(lexicon: Lexicon, length: int, far: int, rng: Random) -> list[Message]:
    """A training document of about `length` words as messages: text up to a question, its answer, and so on."""
    words, tasks = training_document(lexicon, length, far, rng, even=True)
    messages = []
    for answers, run in groupby(zip(words, tasks, strict=True), key=lambda pair: pair[1] >= 0):
        text = " ".join(word for word, _ in run)
        messages.append({"role": "assistant" if answers else "user", "content": text})
    return messages if messages[-1]["role"] == "assistant" else messages[:-1]


def write_chats(config: PocketConfig, path: Path, count: int, lengths: tuple[int, int]) -> None:
    """`count` chats of lengths drawn evenly on a log scale."""
    lexicon = build_lexicon(config.vocabulary)
    rows = []
    for number in range(count):
        rng = Random(f"chats/{number}")
        length = round(lengths[0] * (lengths[1] / lengths[0]) ** rng.random())
        rows.append({"messages": chat(lexicon, length, config.far, rng)})
    _write(path, rows)


def write_tests(config: PocketConfig, folder: Path, length: int, count: int) -> None:
    """`count` texts of a length with a question of each task: those on one text begin alike and are read once."""
    lexicon, rng = build_lexicon(config.vocabulary), Random(f"tests/{length}")
    distractors = min(config.evaluation.distractors, length // 64)
    texts = [test_documents(lexicon, ASKED, length, distractors, rng) for _ in range(count)]
    for place, task in enumerate(ASKED):
        rows = []
        for index, documents in enumerate(texts):
            answer = documents[place].answer.split()
            outputs = answer[::2] if task == "multi_value" else [" ".join(answer)]  # values may come in any order
            rows.append({"index": index, "input": documents[place].prompt, "outputs": outputs, "length": length})
        _write(folder / f"{task}-{length}.jsonl", rows)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write both kinds of files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="folder of a pocket model, with its config.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=200)
    parser.add_argument("--words", type=int, nargs=2, default=[512, 1024], help="of a chat, from and to")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--tests", type=int, nargs="+", default=[10, 5, 4, 2, 2], help="texts of each length")
    args = parser.parse_args()
    config = load_config(args.recipe / "config.yaml")
    write_chats(config, args.out / "chats.jsonl", args.chats, tuple(args.words))
    for length, count in zip(args.lengths, args.tests, strict=True):
        write_tests(config, args.out / "tests", length, count)


if __name__ == "__main__":
    main()
