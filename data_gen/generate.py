"""Documents through a backbone into a trace store, continuing where an earlier run stopped."""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from data_gen.backbones.load import Backbone
from data_gen.config import DocumentsConfig, TraceConfig
from data_gen.core.errors import InputError
from data_gen.text.documents import Document, build_documents
from data_gen.text.needles import NEEDLE_TASKS, Split, vocabulary
from data_gen.text.rows import Skipped
from data_gen.text.sources import measure_overlap
from data_gen.traces.store import TraceStore
from data_gen.traces.types import DocumentMeta, Manifest, RawTrace, Span

Progress = Callable[[Iterable[Document], str], Iterable[Document]]
"""Wraps documents that are about to be read, given what to call it: a progress bar."""


def prepare(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsConfig,
    trace: TraceConfig,
    split: Split,
    skipped: Skipped | None = None,
) -> list[Document]:
    """The documents of `split`; `skipped` counts bad rows where the recipe skips them.

    Raises InputError on bad documents, on none, and when `trace` does not fit the backbone.
    """
    backbone.check(trace)
    built = build_documents(documents, trace, tokenizer, backbone.info.context - trace.own_tokens, split, skipped)
    if not built:
        raise InputError(f"documents.{split}: the recipe asks for no {split} document")
    embeddings: Any = backbone.model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    for document in built:
        if (highest := max(document.tokens)) >= rows:
            raise InputError(
                f"{document.name}: token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) is beyond the "
                f"model's vocabulary of {rows}; the tokenizer is not this model's"
            )
    return built


def generate_sides(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsConfig,
    trace: TraceConfig,
    out: Path,
    progress: Progress,
) -> Iterator[str]:
    """Trace both sides into `out`/train and `out`/heldout, and say what came of them, line by line.

    What is wrong with either side is found before the first document is traced, see `prepare`.
    """
    built: dict[Split, list[Document]] = {}
    for split in get_args(Split):
        skipped = Skipped()
        built[split] = prepare(backbone, tokenizer, documents, trace, split, skipped)
        if skipped.count:
            yield f"{split}: {skipped}"
    if (overlap := measure_overlap(documents)).sharing:
        yield f"warning: {overlap}; recall there is not of unseen text alone"
    for split in get_args(Split):
        store = trace_side(backbone, built.pop(split), documents, trace, split, out / split, progress)
        yield f"{split}: {len(store)} documents in {store.root}"
        if ties := sum(document.meta.near_ties for document in store):
            yield f"{split}: {ties} times the backbone's top-k was cut between near-ties (tokens x layers)"


def generate(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsConfig,
    trace: TraceConfig,
    split: Split,
    root: Path,
    progress: Progress,
) -> TraceStore:
    """Trace all documents of one side into the store at `root`; finished documents are left as they are.

    Raises InputError before anything is written, see `prepare`, and when `root` holds traces made with other settings.
    """
    built = prepare(backbone, tokenizer, documents, trace, split)
    return trace_side(backbone, built, documents, trace, split, root, progress)


def trace_side(
    backbone: Backbone,
    built: list[Document],
    documents: DocumentsConfig,
    trace: TraceConfig,
    split: Split,
    root: Path,
    progress: Progress,
) -> TraceStore:
    """Trace the `built` documents of one side into the store at `root`; finished ones are left as they are.

    Raises InputError when `root` holds traces made with other settings.
    """
    needles = {"needles": vocabulary()} if any(document.task in NEEDLE_TASKS for document in built) else {}
    manifest = Manifest(
        backbone=backbone.info,
        trace=trace,
        documents=documents.model_dump(mode="json", exclude={"bad_rows"}) | {"split": split} | needles,
        texts={document.name: document.digest for document in built},
        versions={name: version(name) for name in ("torch", "transformers")},
    )
    store = TraceStore.create(root, manifest)
    missing = [index for index in range(len(built)) if not store.path(index).exists()]
    for index, document in zip(missing, progress([built[i] for i in missing], f"tracing {split}"), strict=True):
        tokens, spans, raw = _trace(backbone, document, trace)
        meta = DocumentMeta(
            name=document.name,
            task=document.task,
            length=len(tokens),
            spans=spans,
            depth=document.depth,
            near_ties=raw.near_ties,
        )
        store.write(index, meta, raw)
    return store


def _trace(backbone: Backbone, document: Document, trace: TraceConfig) -> tuple[list[int], list[Span], RawTrace]:
    """(tokens, spans of traced rows, trace) of the document itself, or of what the backbone makes of its prompt."""
    if not trace.own_tokens:
        raw = backbone.trace(document.tokens, torch.tensor(document.positions), trace)
        return document.tokens, document.spans, raw
    tokens, raw = backbone.trace_own(document.tokens[: document.prompt], trace)
    serve = max(0, document.prompt - 2 - int(raw.positions[0]))  # as in a document's own answer
    return tokens, [Span(first=0, last=len(raw.positions), serve=serve, tail=True)], raw
