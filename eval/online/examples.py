"""What a benchmark asks: a prompt, how the answer begins, and how it is scored."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from data_gen.text.documents import conversation


@dataclass(frozen=True)
class Example:
    """One question.

    benchmark, task: where it is counted; length: tokens asked for, None for an example of a file, which is as long as
    it is; messages: the prompt; prefix: how the answer begins (RULER's answer prefix), read, not generated;
    references, scorer: see eval/online/scorers.py; answer_tokens: most that are generated behind the prefix;
    depth: mean depth of what is asked for, 0 to 1; left_out: why it cannot be scored, empty when it can.
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

    def prompt(self, tokenizer: PreTrainedTokenizerBase, thinking: bool) -> list[int]:
        """Token ids up to where the answer begins: through the chat template of models that have one."""
        return conversation(tokenizer, self.messages, thinking, prompt=True)

    def opening(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prefix."""
        return tokenizer(self.prefix, add_special_tokens=False).input_ids if self.prefix else []


@dataclass(frozen=True)
class TextExample:
    """Plain text to follow: the last `follow` of `tokens`."""

    name: str
    length: int
    tokens: list[int]
    follow: int
    benchmark: str = "text"
    task: str = "text"


def user(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """The model's message."""
    return {"role": "assistant", "content": text}
