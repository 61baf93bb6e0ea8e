"""Text that training has not seen, to hide needles in and to follow."""

import hashlib
import random

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.sources import read_source, split_paragraphs

ENOUGH = 64
"""Times the longest length asked for at which reading stops: a large source is not read to its end."""


class Haystack:
    """Paragraphs in the order of the source, drawn in runs; runs of different examples may overlap.

    heldout_share: of the source's documents that are used, the same ones as in text/documents.py, 1 for text that
    no training ever saw; longest: tokens of the longest run that will be asked for. Raises InputError for chats and
    when there is less text than that.
    """

    def __init__(
        self, source: str, text_field: str, heldout_share: float, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> None:
        self.tokenizer = tokenizer
        self.paragraphs: list[tuple[str, int]] = []
        found = 0
        texts = (_text(raw, source) for raw in read_source(source, text_field))
        for heldout, paragraphs in split_paragraphs(texts, heldout_share):
            if heldout:
                counted = [(text, len(ids) + 1) for text, ids in zip(paragraphs, self._ids(paragraphs), strict=True)]
                self.paragraphs += counted
                found += sum(length for _, length in counted)
            if found > ENOUGH * longest:
                break
        if found < longest:
            raise InputError(
                f"benchmark: {source} has {found} tokens of text that training did not see, but {longest} are asked "
                "for; name other text (benchmark.haystack) or ask for shorter examples"
            )

    def draw(self, rng: random.Random, tokens: int) -> list[str]:
        """Consecutive paragraphs of about `tokens` tokens from a random place on, the last one cut."""
        place, taken = rng.randrange(len(self.paragraphs)), []
        while tokens > 0:
            text, length = self.paragraphs[place % len(self.paragraphs)]
            if length > tokens:
                text = self.tokenizer.decode(self._ids([text])[0][:tokens])
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


def _text(raw: object, source: str) -> str:
    if not isinstance(raw, str):
        raise InputError(f"benchmark: {source} holds chats, no text to hide needles in; name text: benchmark.haystack")
    return raw
