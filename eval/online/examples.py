"""What is asked: a prompt, how the answer begins, and how it is scored; or a text to follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from data_gen.text.documents import conversation

ALIKE = 1024
"""Characters that two prompts must share at their start for it to be worth while to read those once."""


@dataclass(frozen=True)
class Example:
    """One question.

    benchmark, task: where it is counted; length: tokens asked for, None for an example that is as long as it is;
    messages: the prompt; prefix: how the answer begins (RULER's answer prefix), read, not generated; references,
    scorer: see eval/online/scorers.py; answer_tokens: most that are generated after the prefix; depth: mean depth of
    what is asked for, 0 to 1; left_out: why it cannot be scored, empty when it can; ids: the prompt's tokens, where it
    comes as such, without messages; until_right: an answer ends when its score is 1; later: turns after the prompt,
    the answer to each question and the next question, of which the last is asked.
    """

    name: str
    benchmark: str
    task: str
    length: int | None
    messages: list[dict[str, str]]
    references: list[str]
    scorer: str
    answer_tokens: int
    prefix: str = ""
    depth: float | None = None
    left_out: str = ""
    ids: list[int] = field(default_factory=list)
    until_right: bool = False
    later: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> list[int]:
        """Token ids up to where the answer begins: through the chat template of models that have one."""
        return self.ids or conversation(tokenizer, self.messages, thinking, prompt=True)

    def turns(self, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> list[list[int]]:
        """Token ids of each later turn: the answer before it and its question, up to where the next answer begins.

        What the template opens an answer with, and takes back once the answer is there, has been read by then and
        stays.
        """
        before, found = self.prompt(tokenizer, thinking), []
        for end in range(2, len(self.later) + 1, 2):
            through = conversation(tokenizer, [*self.messages, *self.later[:end]], thinking, prompt=True)
            found.append(through[common(before, through) :])
            before = through
        return found

    def opening(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prefix."""
        return tokenizer(self.prefix, add_special_tokens=False).input_ids if self.prefix else []


@dataclass(frozen=True)
class TextExample:
    """Text to follow: the last `follow` of `tokens`. scorer: how it is compared, of eval/online/scorers.py."""

    name: str
    length: int | None
    tokens: list[int]
    follow: int
    benchmark: str = "text"
    task: str = "text"
    scorer: str = "token_by_token"


def common(first: Sequence[int] | str, second: Sequence[int] | str) -> int:
    """Tokens, or characters, at the start of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def in_order(examples: list[Example]) -> list[tuple[Example, Example | None]]:
    """Examples so that those which begin alike are neighbours, each with its successor where they share a beginning."""
    texts = {example.name: "\n".join(message["content"] for message in example.messages) for example in examples}
    ordered = sorted(examples, key=lambda example: (texts[example.name], example.name))
    pairs: list[tuple[Example, Example | None]] = []
    for example, after in pairwise([*ordered, None]):
        assert example is not None  # only the last `after` is none
        alike = after is not None and common(texts[example.name], texts[after.name]) >= ALIKE
        pairs.append((example, after if alike else None))
    return pairs
