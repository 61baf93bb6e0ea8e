"""Generated examples of the lengths asked for, about text that training has not seen.

Needles after RULER (arXiv 2404.06654), in wordings and with keys that no training document has; the most common words
of a list; like notes after MRCR; plain text to follow.
"""

import hashlib
import random
import string
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from math import ceil
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data_gen.config import BadRows
from data_gen.core.errors import InputError
from data_gen.text.documents import INSTRUCTION, assistant, user
from data_gen.text.needles import DEEPEST, KEYS, PARITY, WORDINGS, Split, make_task
from data_gen.text.rows import Skipped
from data_gen.text.sources import read_source, split_paragraphs
from eval.online.config import BenchmarkConfig
from eval.online.examples import Example, TextExample

ENOUGH = 64
"""Times the longest length asked for at which reading stops: a large source is not read to its end."""
NOTE_TOKENS = 64
"""Length of an MRCR note: what has to be repeated word for word."""
LEAST_TEXT = 64
"""Tokens of haystack below which there is nothing to search."""


class Haystack:
    """Paragraphs in the order of the source, drawn in runs; runs of different examples may overlap.

    heldout_share: of the source's documents that are used, the same ones as in text/documents.py, 1 for text that
    no training ever saw; longest: tokens of the longest run that will be asked for; bad_rows: as of documents, those
    left out are counted by `skipped`. Raises InputError for chats and when there is less text than that.
    """

    def __init__(
        self,
        source: str | list[str],
        text_field: str,
        heldout_share: float,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        bad_rows: BadRows = "stop",
    ) -> None:
        self.tokenizer = tokenizer
        self.skipped = Skipped()
        self.paragraphs: list[tuple[str, int]] = []
        found = 0
        named = source if isinstance(source, str) else ", ".join(source)
        rows = read_source(source, text_field, self.skipped if bad_rows == "skip" else None)
        texts = (_plain(raw, named) for raw in rows)
        for heldout, paragraphs in split_paragraphs(texts, heldout_share):
            if heldout:
                counted = [(text, len(ids) + 1) for text, ids in zip(paragraphs, self._ids(paragraphs), strict=True)]
                self.paragraphs += counted
                found += sum(length for _, length in counted)
            if found > ENOUGH * longest:
                break
        if found < longest:
            raise InputError(
                f"benchmark: {named} has {found} tokens of text that training did not see, but {longest} are asked "
                "for; name other text (benchmark.haystack) or ask for shorter examples"
            )

    def draw(self, rng: random.Random, tokens: int) -> list[str]:
        """Consecutive paragraphs of about `tokens` tokens from a random place on, the last one cut."""
        place, taken = rng.randrange(len(self.paragraphs)), []
        while tokens > 0:
            text, length = self.paragraphs[place % len(self.paragraphs)]
            if length > tokens:
                text = str(self.tokenizer.decode(self._ids([text])[0][:tokens]))
            taken.append(text)
            tokens -= length
            place += 1
        return taken

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256("\n\n".join(text for text, _ in self.paragraphs).encode()).hexdigest()

    def words(self) -> list[str]:
        """Lower-case words of four to nine ASCII letters, each once, sorted."""
        words = {word for text, _ in self.paragraphs for word in text.split() if word.isascii() and word.isalpha()}
        return sorted(word for word in words if 4 <= len(word) <= 9 and word.islower())

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def _plain(raw: object, source: str) -> str:
    if not isinstance(raw, str):
        raise InputError(f"benchmark: {source} holds chats, but needles need plain text; set benchmark.haystack")
    return raw


def generate_examples(
    config: BenchmarkConfig,
    lengths: list[int],
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    thinking: bool,
    split: Split = "heldout",
) -> dict[str, Callable[[], Example | TextExample]]:
    """Name -> how to build it, every example of every task and length, the shortest first, the same on every call.

    split: whose wordings and keys are asked with; those of training are for choosing among indexers. Raises InputError
    where a length leaves no room.
    """
    builder = _ExampleBuilder(config, haystack, tokenizer, thinking, split)
    examples: dict[str, Callable[[], Example | TextExample]] = {}
    for length in sorted(set(lengths)):
        for task in dict.fromkeys([*config.tasks, "mrcr"]):
            for index in range(config.texts if task == "text" else config.examples):
                name = f"{task}-{length}-{index:04d}"
                examples[name] = partial(builder.build, task, length, name)
            examples[f"{task}-{length}-0000"]()  # what cannot be built is found before hours of answers
    return examples


class _ExampleBuilder:
    def __init__(
        self,
        config: BenchmarkConfig,
        haystack: Haystack,
        tokenizer: PreTrainedTokenizerBase,
        thinking: bool,
        split: Split,
    ) -> None:
        self.config, self.haystack, self.tokenizer, self.thinking = config, haystack, tokenizer, thinking
        self.split: Split = split
        self.words = haystack.words() if "aggregation" in config.tasks else []

    def build(self, task: str, length: int, name: str) -> Example | TextExample:
        rng = random.Random(f"{self.config.seed} {name}")
        if task == "text":
            return self._text(name, length, rng)
        draft = {"mrcr": self._mrcr, "aggregation": self._aggregation}.get(task, self._needles)
        return self._fit(draft(task, name, length, rng), length)

    def _fit(self, draft: Callable[[int], Example], length: int) -> Example:
        """The draft with as much haystack as keeps prompt, prefix and answer within `length` tokens, by bisection."""
        found, fits, over = draft(LEAST_TEXT), LEAST_TEXT, length
        if self._size(found) > length:
            raise InputError(f"benchmark: {length} tokens leave no room for text in {found.name}")
        while over - fits > max(8, length // 256):
            tokens = (fits + over) // 2
            example = draft(tokens)
            if self._size(example) > length:
                over = tokens
            else:
                found, fits = example, tokens
        return found

    def _size(self, example: Example) -> int:
        prompt = example.prompt(self.tokenizer, self.thinking)
        return len(prompt) + len(example.opening(self.tokenizer)) + example.answer_tokens

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _haystack(self, name: str, tokens: int) -> list[str]:
        return self.haystack.draw(random.Random(f"{self.config.seed} {name} haystack"), tokens)

    def _text(self, name: str, length: int, rng: random.Random) -> TextExample:
        ids = self.tokenizer("\n\n".join(self.haystack.draw(rng, length)), verbose=False).input_ids[:length]
        if len(ids) < 2 * self.config.text_tokens:
            raise InputError(
                f"benchmark.text_tokens: {self.config.text_tokens} is more than half of a text of {len(ids)} tokens"
            )
        return TextExample(name, length, ids, self.config.text_tokens)

    def _needles(self, task: str, name: str, length: int, rng: random.Random) -> Callable[[int], Example]:
        question = QUESTIONS[task](rng, self.config, self.split)
        # Twice what the answer takes, for models that list what they found.
        answer_tokens = 2 * self._count(question.answer) + 8

        def draft(tokens: int) -> Example:
            text = "\n\n".join(hide(self._haystack(name, tokens), question.needles))
            found = [text.index(sentence) / len(text) for sentence, _ in question.needles[: question.asked]]
            return Example(
                name, "needles", task, length, [user(f"{INSTRUCTION}{text}\n\n{question.text}")], question.references,
                "string_match_all", answer_tokens, question.prefix, sum(found) / len(found),
            )  # fmt: skip

        return draft

    def _aggregation(self, task: str, name: str, length: int, rng: random.Random) -> Callable[[int], Example]:
        """The most common words of a long list (RULER's cwe: ten times as often as any other): every chunk matters."""
        wanted = self.config.common
        words = rng.sample(self.words, len(self.words))
        common, rare = words[:wanted], words[wanted:]
        if len(rare) < 10 * wanted:
            raise InputError(
                f"benchmark.common: {wanted} needs {11 * wanted} words of text, but there are {len(words)}"
            )
        per_entry = self._count("\n".join(f"1. {word}" for word in rare)) / len(rare)  # at least
        answer_tokens = 2 * self._count(", ".join(common)) + 8

        def draft(tokens: int) -> Example:
            entries = int(tokens / per_entry)
            seldom = ceil(entries / (len(rare) + 10 * wanted))
            others = rare[: max(0, entries - 10 * seldom * wanted) // max(1, seldom)]
            listed = (common * 10 + others) * seldom
            random.Random(f"{self.config.seed} {name} order").shuffle(listed)
            lines = "\n".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
            text = f"Below is a numbered list of words. Some appear more often than others.\n\n{lines}\n\n"
            return Example(
                name, "needles", task, length, [user(f"{text}What are the {wanted} words that appear most often?")],
                common, "string_match_all", answer_tokens, f"The {wanted} words that appear most often are:",
            )  # fmt: skip

        return draft

    def _mrcr(self, task: str, name: str, length: int, rng: random.Random) -> Callable[[int], Example]:
        """The n-th of many like notes, word for word (OpenAI MRCR): every other note is a distractor.

        The required random prefix opens the answer, so that models that were never tuned to it can be scored.
        """
        topics, mark = rng.sample(KEYS[self.split], 3), "".join(rng.choices(string.ascii_letters + string.digits, k=8))
        pick = rng.uniform(0, DEEPEST)
        per_turn = NOTE_TOKENS + self._count(f"Write a note about the {topics[0]}.") + 8

        def draft(tokens: int) -> Example:
            text = " ".join(" ".join(self._haystack(name, max(tokens, NOTE_TOKENS))).split())
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            turns = max(1, tokens // per_turn)
            cut = [ids[turn * NOTE_TOKENS : (turn + 1) * NOTE_TOKENS] for turn in range(turns)]
            notes = [str(self.tokenizer.decode(each)).strip() for each in cut]
            messages = []
            for place, note in enumerate(notes):
                messages += [user(f"Write a note about the {topics[place % len(topics)]}."), assistant(note)]
            found = int(pick * len(notes[:: len(topics)]))
            ask = f"Prepend {mark} to the {_ordinal(found + 1)} (1 indexed) note about the {topics[0]}."
            messages.append(user(f"{ask} Do not include any other text in your response."))
            answer, depth = mark + notes[found * len(topics)], found * len(topics) / turns
            return Example(
                name, "mrcr", task, length, messages, [answer, mark], "sequence_ratio", NOTE_TOKENS + 8, mark, depth
            )

        return draft


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


Ask = Callable[[random.Random, BenchmarkConfig, Split], Question]


def _needle_task(name: str) -> Ask:
    def ask(rng: random.Random, config: BenchmarkConfig, split: Split) -> Question:
        task = make_task(name, split, rng, config.keys, config.values)
        prefix, value, rest = task.answer.partition(f" {task.values[0]}")
        return Question(task.needles, task.asked, task.question, prefix, value + rest, task.values)

    return ask


def _multi_query(rng: random.Random, config: BenchmarkConfig, split: Split) -> Question:
    """Several keys asked for at once."""
    wording, keys = rng.choice(WORDINGS[split]), rng.sample(KEYS[split], config.queries)
    values = [str(2 * n + PARITY[split]) for n in rng.sample(range(5_000, 50_000), len(keys))]
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


def _variable_tracking(rng: random.Random, config: BenchmarkConfig, split: Split) -> Question:
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


QUESTIONS: dict[str, Ask] = {
    **{name: _needle_task(name) for name in ("single", "multi_key", "multi_value")},
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
