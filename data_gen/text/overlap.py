"""Text that whole held-out documents have in common with training ones, which packing to a length rules out."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from data_gen.config import DocumentsConfig
from data_gen.text.documents import WHOLE, whole_documents
from data_gen.text.sources import RawDocument

LEAST = 80
"""Characters of a paragraph that counts: headings and thanks are everybody's."""


@dataclass
class Overlap:
    """documents: held-out ones; sharing: those with a paragraph of a training document; share: of all their text."""

    documents: int
    sharing: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.sharing} of {self.documents} held-out documents share paragraphs with training ones "
            f"({self.share:.1%} of the held-out text)"
        )


def measure_overlap(config: DocumentsConfig) -> Overlap:
    """Of the documents and chats that are read whole; of packed text it is none."""
    training, heldout = (sum(tasks.get(task, 0) for task in WHOLE) for tasks in (config.train, config.heldout))
    if not training or not heldout:
        return Overlap(heldout, 0, 0.0)
    documents = whole_documents(config)
    seen = {paragraph for document in islice(documents, training) for paragraph in _paragraphs(document)}
    sharing = common = total = 0
    for document in islice(documents, heldout):
        paragraphs = list(_paragraphs(document))
        shared = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        sharing, common, total = sharing + bool(shared), common + shared, total + sum(map(len, paragraphs))
    return Overlap(heldout, sharing, common / max(1, total))


def _paragraphs(document: RawDocument) -> Iterator[str]:
    """White space aside."""
    texts = [document] if isinstance(document, str) else [message["content"] for message in document]
    for text in texts:
        for paragraph in text.split("\n\n"):
            if len(paragraph := " ".join(paragraph.split())) >= LEAST:
                yield paragraph
