"""Is a document of a trace store what it says it is: named before work starts, not when a step meets it."""

import torch
from tqdm import tqdm

from data_gen.core.files import broken_seal, whole
from data_gen.core.keys import KEY_RECIPES, key_vectors
from data_gen.traces.store import REMEDY, TraceDocument, TraceStore
from data_gen.traces.types import Manifest


def check_store(store: TraceStore) -> None:
    """Check every byte of every document. Raises InputError that names the first damaged one."""
    for document in tqdm(store, "checking", len(store.paths()), delay=5, unit="doc"):
        check_document(document, store.manifest)


def check_document(document: TraceDocument, manifest: Manifest) -> None:
    """Check every byte, the shapes, row numbers and chunk numbers of one document.

    Raises InputError that names the file and what is wrong with it.
    """
    with whole(document.path, "trace", REMEDY):
        reason = broken_seal(document.path) or _shapes(document, manifest) or _oracle(document)
        if reason := reason or _content(document, manifest):
            raise ValueError(reason)


def _shapes(document: TraceDocument, manifest: Manifest) -> str | None:
    backbone, positions = manifest.backbone, document.positions
    rows, chunks = len(positions), document.chunks
    width = KEY_RECIPES[backbone.key].row(backbone.key_width)
    for layer in manifest.trace.layers:
        for name, expected in (("hidden", [rows, backbone.hidden]), ("keys", [chunks, width])):
            if (shape := document.shape(f"layers.{layer}.{name}")) != expected:
                return f"layers.{layer}.{name} is {shape} beside {rows} rows and {chunks} chunks"
    if rows and (int(positions[0]) < 0 or bool((positions.diff() <= 0).any())):
        return "positions do not ascend"
    if backbone.rope is not None and rows and int(positions[-1]) >= backbone.rope.positions:
        return f"position {int(positions[-1])} is beyond the backbone's {backbone.rope.positions}"
    if any(not 0 <= span.first <= span.serve <= span.last <= rows for span in document.meta.spans):
        return f"its spans leave its {rows} rows"
    return None


def _oracle(document: TraceDocument) -> str | None:
    oracle = document.golden if document.trace.oracle == "indexer" else document.attention
    pointers, chunks = oracle.pointers, oracle.chunks
    if len(pointers) != len(document.positions) + 1 or int(pointers[0]) or int(pointers[-1]) != len(chunks):
        return "the oracle's rows are not the document's"
    if bool((pointers.diff() < 0).any()):
        return "the oracle's rows do not ascend"
    if len(chunks) and not 0 <= int(chunks.min()) <= int(chunks.max()) < document.chunks:
        return f"the oracle names chunk {int(chunks.max())} of {document.chunks}"
    return None


def _content(document: TraceDocument, manifest: Manifest) -> str | None:
    tensors = document.tensors()
    for layer in manifest.trace.layers:
        extremes = torch.stack(tensors[f"layers.{layer}.hidden"].aminmax())  # NaN spreads; far faster than all values
        if not bool(extremes.isfinite().all()):
            return f"layers.{layer}.hidden holds NaN or infinity"
        if not bool(key_vectors(tensors[f"layers.{layer}.keys"]).isfinite().all()):
            return f"layers.{layer}.keys hold NaN or infinity"
    return None
