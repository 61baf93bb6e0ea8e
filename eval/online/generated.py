"""Generated examples of the lengths asked for: needles after RULER, common words, like notes after MRCR, plain text."""

import random
import string
from collections.abc import Callable
from functools import partial
from math import ceil

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.documents import INSTRUCTION
from data_gen.text.needles import DEEPEST, KEYS
from eval.online.config import BenchmarkConfig
from eval.online.examples import Example, TextExample, assistant, user
from eval.online.haystack import Haystack
from eval.online.questions import QUESTIONS, hide

NOTE_TOKENS = 64
"""Length of an MRCR note: what has to be repeated word for word."""
LEAST_TEXT = 64
"""Tokens of haystack below which there is nothing to search."""


def generate_examples(
    config: BenchmarkConfig, lengths: list[int], haystack: Haystack, tokenizer: PreTrainedTokenizerBase, thinking: bool
) -> dict[str, Callable[[], Example | TextExample]]:
    """Name -> how to build it, every example of every task and length, the shortest first, the same on every call.

    Raises InputError where a length leaves no room.
    """
    builder = _Builder(config, haystack, tokenizer, thinking)
    examples: dict[str, Callable[[], Example | TextExample]] = {}
    for length in sorted(set(lengths)):
        for task in dict.fromkeys([*config.tasks, "mrcr"]):
            for index in range(config.texts if task == "text" else config.examples):
                name = f"{task}-{length}-{index:04d}"
                examples[name] = partial(builder.build, task, length, name)
            examples[f"{task}-{length}-0000"]()  # what cannot be built is found before hours of answers
    return examples


class _Builder:
    def __init__(
        self, config: BenchmarkConfig, haystack: Haystack, tokenizer: PreTrainedTokenizerBase, thinking: bool
    ) -> None:
        self.config, self.haystack, self.tokenizer, self.thinking = config, haystack, tokenizer, thinking
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
                f"benchmark.text_tokens: {self.config.text_tokens} to follow of a text of {len(ids)}; at most half"
            )
        return TextExample(name, length, ids, self.config.text_tokens)

    def _needles(self, task: str, name: str, length: int, rng: random.Random) -> Callable[[int], Example]:
        question = QUESTIONS[task](rng, self.config)
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
            raise InputError(f"benchmark.common: {wanted} needs {11 * wanted} words of text, {len(words)} are there")
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
        topics, mark = rng.sample(KEYS["heldout"], 3), "".join(rng.choices(string.ascii_letters + string.digits, k=8))
        pick = rng.uniform(0, DEEPEST)
        per_turn = NOTE_TOKENS + self._count(f"Write a note about the {topics[0]}.") + 8

        def draft(tokens: int) -> Example:
            text = " ".join(" ".join(self._haystack(name, max(tokens, NOTE_TOKENS))).split())
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            turns = max(1, tokens // per_turn)
            notes = [self.tokenizer.decode(ids[k * NOTE_TOKENS : (k + 1) * NOTE_TOKENS]).strip() for k in range(turns)]
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


def _ordinal(number: int) -> str:
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
