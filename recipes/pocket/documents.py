"""Files for the toolkit: chats to trace, questions in RULER's format, and text to follow.

    python -m recipes.pocket.documents recipes/pocket_v4 --out X

X/chats.jsonl: the training language, each answer a message of its own; X/report/TASK-LENGTH.jsonl: questions at the end
of texts of LENGTH tokens, for figures; X/development/TASK-LENGTH.jsonl: others, of other texts about other keys and
names, on which to choose; X/text.jsonl: the language itself, questions and answers between its sentences. None of these
documents is among the model's or the indexer's training documents.
"""

import argparse
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Literal, get_args

from recipes.pocket.config import PocketConfig, load_config
from recipes.pocket.tasks import asked_once, test_documents
from recipes.pocket.words import Lexicon, build_lexicon

ASKED = ("multi_key", "multi_value", "tracking", "copy")
Message = dict[str, str]
Side = Literal["development", "report"]
TEXTS: dict[Side, dict[int, int]] = {
    "development": {1024: 100},
    "report": {1024: 25, 2048: 10, 4096: 6, 8192: 3, 16384: 2},
}
"""Length -> how many texts of it are asked about."""
FOLLOWED, TEXT_WORDS = 20, 2048
"""Texts to follow, and their words at most."""


def side_of(lexicon: Lexicon, side: Side) -> Lexicon:
    """The words of one side's questions: every other key and name, so that none is asked about on both."""
    first = get_args(Side).index(side)
    return replace(lexicon, keys=lexicon.keys[first::2], names=lexicon.names[first::2])


def chat(lexicon: Lexicon, length: int, far: int, rng: Random) -> list[Message]:
    """At most `length` words, asked once, as messages: text up to a question, its answer, and so on."""
    words, tasks = asked_once(lexicon, length, far, rng)
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


def write_texts(config: PocketConfig, path: Path, count: int) -> None:
    """`count` texts of at most TEXT_WORDS words: what chats have in messages of their own."""
    lexicon = side_of(build_lexicon(config.vocabulary), "report")
    texts = [asked_once(lexicon, TEXT_WORDS, config.far, Random(f"text/{number}")) for number in range(count)]
    _write(path, [{"text": " ".join(words)} for words, _ in texts])


def write_questions(config: PocketConfig, folder: Path, side: Side, length: int, count: int) -> None:
    """`count` texts of a length with a question of each task: those on one text begin alike and are read once."""
    lexicon, rng = side_of(build_lexicon(config.vocabulary), side), Random(f"{side}/{length}")
    distractors = min(config.evaluation.distractors, length // 64)
    texts = [test_documents(lexicon, ASKED, length, distractors, rng) for _ in range(count)]
    for place, task in enumerate(ASKED):
        rows = []
        for index, documents in enumerate(texts):
            answer = documents[place].answer.split()
            outputs = answer[::2] if task == "multi_value" else [" ".join(answer)]  # values may come in any order
            rows.append({"index": index, "input": documents[place].prompt, "outputs": outputs, "length": length})
        _write(folder / side / f"{task}-{length}.jsonl", rows)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="folder of a pocket model, with its config.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=230)
    parser.add_argument("--words", type=int, nargs=2, default=[512, 1024], help="of a chat, from and to")
    args = parser.parse_args()
    config = load_config(args.recipe / "config.yaml")
    write_chats(config, args.out / "chats.jsonl", args.chats, tuple(args.words))
    for side, counts in TEXTS.items():
        for length, count in counts.items():
            write_questions(config, args.out, side, length, count)
    write_texts(config, args.out / "text.jsonl", FOLLOWED)


if __name__ == "__main__":
    main()
