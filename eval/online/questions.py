"""Questions over a haystack after RULER (arXiv 2404.06654), in wordings and with keys that no training document has."""

import random
import string
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from data_gen.text.needles import DEEPEST, KEYS, PARITY, WORDINGS, make_task
from eval.online.config import BenchmarkConfig


class Question(NamedTuple):
    """needles: (sentence, depth 0 to 1), the first `asked` are asked for; prefix, answer: the answer in two parts."""

    needles: list[tuple[str, float]]
    asked: int
    text: str
    prefix: str
    answer: str
    references: list[str]


def hide(paragraphs: list[str], needles: list[tuple[str, float]]) -> list[str]:
    """The paragraphs with each needle at the joint nearest to its depth; needles of one joint in order of depth."""
    ends = [0, *accumulate(len(paragraph) for paragraph in paragraphs)]
    hidden = list(paragraphs)
    for sentence, depth in sorted(needles, key=lambda needle: -needle[1]):
        joint = min(range(len(ends)), key=lambda place: abs(ends[place] - depth * ends[-1]))
        hidden.insert(joint, sentence)
    return hidden


def _needle_task(name: str) -> Callable[[random.Random, BenchmarkConfig], Question]:
    def ask(rng: random.Random, config: BenchmarkConfig) -> Question:
        task = make_task(name, "heldout", rng, config.keys, config.values)
        prefix, value, rest = task.answer.partition(f" {task.values[0]}")
        return Question(task.needles, task.asked, task.question, prefix, value + rest, task.values)

    return ask


def _multi_query(rng: random.Random, config: BenchmarkConfig) -> Question:
    """Several keys asked for at once."""
    wording, keys = rng.choice(WORDINGS["heldout"]), rng.sample(KEYS["heldout"], config.queries)
    values = [str(2 * n + PARITY["heldout"]) for n in rng.sample(range(5_000, 50_000), len(keys))]
    sentences = [wording.needle.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    listed, answer = " and the ".join(keys), " ".join(["", " and ".join(values)])
    return Question(
        needles=[(sentence, rng.uniform(0, DEEPEST)) for sentence in sentences],
        asked=len(keys),
        text=wording.question_all.format(key=listed),
        prefix=wording.answer_all.format(key=listed, value="").removesuffix(" ."),
        answer=answer,
        references=values,
    )


def _variable_tracking(rng: random.Random, config: BenchmarkConfig) -> Question:
    """A chain of assignments through the text, in order; all its names are asked for."""
    names: list[str] = []
    while len(names) <= config.hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_001, 99_999, 2))
    sources = [value, *[f"VAR {name}" for name in names[:-1]]]
    depths = sorted(rng.uniform(0, DEEPEST) for _ in names)
    return Question(
        needles=[(f"VAR {n} = {s}.", depth) for n, s, depth in zip(names, sources, depths, strict=True)],
        asked=len(names),
        text=f"Find all variables that are assigned the value {value} in the text above.",
        prefix=f"By the chain of assignments in the text above, {len(names)} variables are assigned the value {value}:",
        answer=f" {' '.join(names)}",
        references=names,
    )


QUESTIONS: dict[str, Callable[[random.Random, BenchmarkConfig], Question]] = {
    **{name: _needle_task(name) for name in ("single", "multi_key", "multi_value")},
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}
