"""The plan: every document of both sides, frozen before the first one is traced; what is traced is read from it.

OUT/plan.parquet    a row for each document, training ones first; its metadata: the settings that documents depend on.
It is written as documents are drawn, a group of rows at a time, so that memory does not grow with the tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from data_gen.config import DocumentsConfig, TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import alone, sweep, whole, write_atomically
from data_gen.text.documents import Document, draw_documents, source_hash
from data_gen.text.needles import NEEDLE_TASKS, Split, vocabulary
from data_gen.text.rows import Skipped
from data_gen.text.sources import documents_of, measure_overlap, raw_digest
from data_gen.traces.progress import PLAN, REMEDY
from data_gen.traces.types import Span

SIDES: tuple[Split, ...] = get_args(Split)
SETTINGS, NOTES = b"settings", b"notes"
SCHEMA = pa.schema(
    {
        "document": pa.string(),
        "side": pa.string(),
        "task": pa.string(),
        "seed": pa.string(),
        "source_position": pa.list_(pa.int64()),
        "source_hash": pa.string(),
        "content_hash": pa.string(),
        "length": pa.int32(),
        "rows": pa.int32(),
        "prompt": pa.int32(),
        "values": pa.list_(pa.string()),
        "depth": pa.float64(),
        "spans": pa.string(),
        "positions": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.int32()),
    }
)
"""length: tokens; rows: query tokens traced; source_position: numbers of the source's documents whose text it has."""
BRIEF = ["document", "side", "task", "content_hash", "length", "rows"]
"""Columns whose size does not depend on the documents' lengths."""
GROUP_TOKENS, GROUP_DOCUMENTS = 1 << 20, 1000
"""Of a group of rows, at most: what is in memory at a time."""
SHAPING = {"chunking", "window", "text_rows", "answer_lead", "tail", "own_tokens"}
"""Settings of a trace that decide which tokens are read and which of them are query tokens."""


class Plan:
    """The documents of a plan, by side and number. Raises InputError when the file is none, or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group: tuple[int, Any] = -1, None
        with self._opened() as file:
            metadata = file.metadata.metadata
            self.settings: dict[str, Any] = json.loads(metadata[SETTINGS])
            self.notes: list[str] = json.loads(metadata[NOTES])

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        """The file, for one reading: none stays open between two. Raises InputError where it is damaged."""
        with whole(self.path, "plan", REMEDY), pq.ParquetFile(self.path, page_checksum_verification=True) as file:
            yield file

    def _read(self, columns: list[str]) -> Iterator[pa.Table]:
        """Some columns, a group of rows at a time."""
        with self._opened() as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns)

    @cached_property
    def brief(self) -> dict[Split, list[dict[str, Any]]]:
        """By side, what is known of each document in a few numbers: `BRIEF`, and where its row lies."""
        found: dict[Split, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for group, rows in enumerate(self._read(BRIEF)):
            for place, row in enumerate(rows.to_pylist()):
                found[row["side"]].append(row | {"group": group, "place": place})
        return found

    def content(self, side: Split) -> dict[int, tuple[str, str]]:
        """(name, content hash) of each document of a side, by its number."""
        return {number: (row["document"], row["content_hash"]) for number, row in enumerate(self.brief[side])}

    def documents(self, side: Split) -> Iterator[Document]:
        """All documents of a side in order; one group of rows is in memory. Raises InputError as `document`."""
        return map(partial(self.document, side), range(len(self.brief[side])))

    def document(self, side: Split, number: int) -> Document:
        """One document; quick where the last one was of the same group of rows.

        Raises InputError where it is not what was planned.
        """
        brief = self.brief[side][number]
        if self._group[0] != brief["group"]:
            with self._opened() as file:
                self._group = brief["group"], file.read_row_group(brief["group"])
        with whole(self.path, "plan", REMEDY):
            document = _document(self._group[1].slice(brief["place"], 1).to_pylist()[0])
            if document.digest != brief["content_hash"]:
                raise ValueError(f"{document.name} is not what was planned")
        return document

    def check_source(self, documents: DocumentsConfig) -> None:
        """Raise InputError, which names the first document whose source is not what it was when it was planned."""
        lists = (group["source_position"].combine_chunks() for group in self._read(["source_position"]))
        needed = np.unique(np.concatenate([np.unique(each.flatten()) for each in lists]))
        # Not a dictionary: there may be millions of texts, each of which would be several objects.
        digests, found = np.zeros((len(needed), hashlib.sha256().digest_size), np.uint8), 0
        for number, raw in enumerate(documents_of(documents)) if len(needed) else ():
            if number == needed[found]:
                digests[found] = np.frombuffer(raw_digest(raw), np.uint8)
                found += 1
                if found == len(needed):
                    break
        columns = ["document", "source_position", "source_hash"]
        for row in (row for group in self._read(columns) for row in group.to_pylist()):
            places = np.searchsorted(needed, row["source_position"])
            if source_hash([digests[places[places < found]].tobytes()]) != row["source_hash"]:
                raise InputError(
                    f"{self.path}: {row['document']} was made of a text that the source no longer has there; "
                    "restore it, or choose another folder"
                )


def open_plan(
    out: Path,
    documents: DocumentsConfig,
    trace: TraceConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int],
    sides: Sequence[Split] = SIDES,
    check: bool = True,
) -> Plan:
    """The plan in `out`, written if there is none; whoever comes while another process writes it waits.

    limits: the backbone's context and vocabulary in tokens. check: compare the source with a plan that is there, which
    others may go by meanwhile.
    Raises InputError on bad documents, on a source that changed, and where traces were made with other settings.
    """
    path, settings = out / PLAN, _settings(documents, trace, tokenizer, limits, sides)
    with alone(out):
        sweep(out)
        plan = Plan(path) if path.exists() else None
        if plan and (other := next((name for name in settings if plan.settings.get(name) != settings[name]), None)):
            if any(out.glob("*/*/doc_*")):
                raise InputError(f"{out}: holds traces made with another {other}; choose another folder")
            plan = None
        if plan is None:
            _write(path, documents, trace, tokenizer, limits, sides, settings)
            return Plan(path)
    if check:
        plan.check_source(documents)
    return plan


def _settings(
    documents: DocumentsConfig,
    trace: TraceConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int],
    sides: Sequence[Split],
) -> dict[str, Any]:
    tasks = documents.train.keys() | documents.heldout.keys()
    return {
        "documents": documents.model_dump(mode="json", exclude={"bad_rows"}),
        "trace": trace.model_dump(mode="json", include=SHAPING),
        "tokenizer": _tokenizer_hash(tokenizer),
        "limits": list(limits),
        "needles": vocabulary() if tasks & NEEDLE_TASKS.keys() else "",
        "sides": list(sides),
    }


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what turns text into tokens; padding and truncation, which a call may leave behind, do not."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    read = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    words = {name: value for name, value in read.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps([words, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()[:16]


def _write(
    path: Path,
    documents: DocumentsConfig,
    trace: TraceConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int],
    sides: Sequence[Split],
    settings: dict[str, Any],
) -> None:
    context, vocabulary_size = limits
    notes: list[str] = []
    unfit: set[int] = set()

    def rows() -> Iterator[tuple[Split, Document]]:
        for side in sides:
            skipped, count = Skipped(), 0
            for document in draw_documents(documents, trace, tokenizer, context - trace.own_tokens, side, skipped):
                _check_tokens(document, tokenizer, vocabulary_size)
                yield side, document
                count += 1
            if not count:
                raise InputError(f"documents.{side}: the recipe asks for no {side} document")
            notes.extend([f"{side}: {skipped}"] if skipped.count else [])
            unfit.update(skipped.unfit)
        if len(sides) == len(SIDES) and (overlap := measure_overlap(documents, unfit)).sharing:
            notes.append(f"warning: {overlap}; recall there is not of unseen text alone")

    def write(file: Path) -> None:
        options: Any = {"compression": "zstd", "write_page_checksum": True}
        # The sink is ours, so that it is closed where the disk is full, too.
        with open(file, "wb") as sink, pq.ParquetWriter(sink, SCHEMA, **options) as writer:
            for group in _groups(rows()):
                writer.write_table(pa.Table.from_pylist([_row(*each) for each in group], SCHEMA))
            writer.add_key_value_metadata({SETTINGS: json.dumps(settings), NOTES: json.dumps(notes)})

    write_atomically(path, write)


def _groups(rows: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    group: list[tuple[Split, Document]] = []
    tokens = 0
    for row in rows:
        group.append(row)
        tokens += len(row[1].tokens)
        if tokens >= GROUP_TOKENS or len(group) == GROUP_DOCUMENTS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _check_tokens(document: Document, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    if (highest := max(document.tokens)) >= size:
        raise InputError(
            f"{document.name}: token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) is beyond the model's "
            f"vocabulary of {size}; the tokenizer is not this model's"
        )


def _row(side: Split, document: Document) -> dict[str, Any]:
    return {
        "document": document.name,
        "side": side,
        "task": document.task,
        "seed": document.seed,
        "source_position": document.sources,
        "source_hash": document.source,
        "content_hash": document.digest,
        "length": len(document.tokens),
        "rows": len(document.positions),
        "prompt": document.prompt,
        "values": document.values,
        "depth": document.depth,
        "spans": json.dumps([span.model_dump() for span in document.spans]),
        "positions": document.positions,
        "tokens": document.tokens,
    }


def _document(row: dict[str, Any]) -> Document:
    return Document(
        name=row["document"],
        task=row["task"],
        tokens=row["tokens"],
        prompt=row["prompt"],
        spans=[Span.model_validate(span) for span in json.loads(row["spans"])],
        positions=row["positions"],
        values=row["values"],
        depth=row["depth"],
        seed=row["seed"],
        sources=row["source_position"],
        source=row["source_hash"],
    )
