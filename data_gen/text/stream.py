"""Paragraphs of one side of a source, in order, for documents that are packed to a length."""

from collections import deque

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.text.needles import Split
from data_gen.text.rows import RawDocument
from data_gen.text.sources import Numbered, split_paragraphs


class Stream:
    """Paragraphs of one side of a source, read as they are needed and each handed out once.

    So no two documents, of whichever side, share text: not those that validation holds back either.
    """

    def __init__(
        self, source: Numbered, heldout_share: float, tokenizer: PreTrainedTokenizerBase, split: Split
    ) -> None:
        self.source = source
        sides = split_paragraphs((_as_text(document) for document in source), heldout_share)
        self.texts = (paragraphs for held_out, paragraphs in sides if held_out == (split == "heldout"))
        self.tokenizer, self.split = tokenizer, split
        self.unused: deque[tuple[str, int, tuple[int, bytes]]] = deque()
        self.read = 0

    def take(self, tokens: int, used: dict[int, bytes]) -> list[str]:
        """Paragraphs of about `tokens` tokens, the last one cut. Raises InputError at the end of the source.

        used: learns which of the source's documents they come from.
        """
        taken: list[str] = []
        while tokens > 0:
            text, length, origin = self._next()
            used.update([origin])
            if length > tokens:
                ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:tokens]
                text = str(self.tokenizer.decode(ids))
            taken.append(text)
            tokens -= length
        return taken

    def _next(self) -> tuple[str, int, tuple[int, bytes]]:
        """(paragraph, its tokens, whose it is)."""
        while not self.unused:
            paragraphs = next(self.texts, None)
            if paragraphs is None:
                raise InputError(
                    f"documents: only {self.read} tokens of text for {self.split} documents; ask for fewer or shorter"
                )
            ids = self.tokenizer(paragraphs, add_special_tokens=False, verbose=False).input_ids
            origin = self.source.last
            self.unused.extend((text, len(piece) + 1, origin) for text, piece in zip(paragraphs, ids, strict=True))
            self.read += sum(map(len, ids))
        return self.unused.popleft()


def _as_text(document: RawDocument) -> str:
    if not isinstance(document, str):
        raise InputError("documents: chats cannot be packed; use the task `chat`")
    return document
