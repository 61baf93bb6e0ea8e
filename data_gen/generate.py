"""Documents through a backbone into a trace store, continuing where an earlier run stopped."""

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from data_gen.backbones.base import Backbone
from data_gen.config import DocumentsConfig, TraceConfig
from data_gen.documents import Document, build_documents
from data_gen.errors import InputError
from data_gen.store import DocumentMeta, Manifest, TraceStore
from data_gen.tasks import Split

Progress = Callable[[Iterable[Document], str], Iterable[Document]]


def generate(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsConfig,
    trace: TraceConfig,
    split: Split,
    root: Path,
    progress: Progress,
) -> TraceStore:
    """Trace all documents of `split` into the store at `root`; finished documents are left as they are.

    progress: wraps the documents still to read, given what to call them. Raises InputError on bad documents before
    anything is written, and when `root` holds traces made with other settings.
    """
    built = build_documents(documents, trace, tokenizer, backbone.info.context, split)
    if not built:
        raise InputError(f"the recipe asks for no {split} document")
    manifest = Manifest(
        backbone=backbone.info,
        trace=trace,
        documents=documents.model_dump(mode="json") | {"split": split},
        versions={name: version(name) for name in ("torch", "transformers")},
    )
    store = TraceStore.create(root, manifest)
    missing = [index for index in range(len(built)) if not store.path(index).exists()]
    for index, document in zip(missing, progress([built[i] for i in missing], f"tracing {split}"), strict=True):
        raw = backbone.trace(document.tokens, torch.tensor(document.positions), trace)
        meta = DocumentMeta(
            name=document.name,
            task=document.task,
            length=len(document.tokens),
            spans=document.spans,
            depth=document.depth,
        )
        store.write(index, meta, raw)
    return store
