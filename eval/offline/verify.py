"""Recompute logits in float64: what the backbone's own indexer stored in a trace, and what a trained one scores."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from data_gen.core.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import NativeRow
from eval.offline.reference import match, reference_scores, rotated, sylvester
from eval.report.tables import Table
from indexer_train.formats.native import read_native
from indexer_train.formats.weights import LayerWeights
from indexer_train.load import check_traces
from indexer_train.model import MemoryIndexer

TOP = (10, 20, 50, 512, 1024)
NATIVE_PEARSON, NATIVE_TOP10 = 0.99, 0.9
"""Native logits pass when every token correlates and the best ten agree on average: keys (and the release's queries)
were rounded to fp8, logits and hidden states to bf16."""
LEAST = 10
"""Chunks below which a token's native logits prove nothing: any two of them correlate."""
ERROR = 1e-4
"""A trained indexer passes when fp32 differs from float64 by no more, relative to the token's largest score."""


@dataclass(frozen=True)
class Agreement:
    """One query token of one layer (or of all joined) against the reference, over the chunks visible to it.

    pearson: correlation; overlap: share of the k best that the reference has among its k best, ties counted in favour;
    error: largest difference / largest magnitude of the reference.
    """

    what: str
    document: str
    position: int
    chunks: int
    pearson: float
    overlap: dict[int, float]
    error: float

    @classmethod
    def between(
        cls, what: str, document: TraceDocument, row: int, found: np.ndarray, reference: np.ndarray, slack: float
    ) -> "Agreement":
        """found, reference: [n] logits; slack: what counts as a tie, relative to the largest magnitude."""
        largest = max(float(np.abs(reference).max()), 1e-30)
        spread = found.std() > 0 and reference.std() > 0
        ranked, order = np.sort(reference)[::-1], np.argsort(-found, kind="stable")
        overlap = {}
        for k in TOP:
            taken = min(k, len(found))
            overlap[k] = float((reference[order[:taken]] >= ranked[taken - 1] - slack * largest).mean())
        return cls(
            what=what,
            document=document.meta.name,
            position=int(document.positions[row]),
            chunks=len(found),
            pearson=float(np.corrcoef(found, reference)[0, 1]) if spread else float(np.allclose(found, reference)),
            overlap=overlap,
            error=float(np.abs(found - reference).max()) / largest,
        )


@dataclass(frozen=True)
class Verdict:
    """rows: what was compared; failures: one line for each thing that is off; notes: on what was left out."""

    rows: list[Agreement]
    failures: list[str]
    notes: list[str] = field(default_factory=list)


def verify_native(store: TraceStore, checkpoint: Path | None) -> Verdict:
    """Stored native logits against hidden states, keys and the backbone's own indexer weights at `checkpoint`.

    Without a checkpoint the stored queries and head weights take their place: that proves keys and scoring only.
    Raises InputError when the traces keep no logits, or neither a checkpoint nor queries are there.
    """
    layers = store.manifest.trace.layers
    weights = None if checkpoint is None else read_native(checkpoint, layers)
    rows, failures, few = [], [], 0
    for document, layer in ((document, layer) for document in store for layer in layers):
        keys = document.keys(layer)
        for row, native in document.native(layer).items():
            position, what = int(document.positions[row]), f"native, layer {layer}"
            visible = document.trace.chunking.visible(position)
            if reason := _unusable(native, visible):
                failures.append(f"{what}, {document.meta.name}, position {position}: {reason}")
            elif min(visible, len(keys)) < LEAST:
                few += 1
            else:
                part = None if weights is None else weights[layer]
                rows.append(_compare_native(store, document, layer, row, native, part))
    notes = [f"skipped: {few} native rows with fewer than {LEAST} chunks to compare"] if few else []
    if not rows and not failures:
        raise InputError(". ".join([f"{store.root}: the traces keep no native logits to verify", *notes]))
    off = [row for row in rows if not row.pearson >= NATIVE_PEARSON]  # NaN is off as well
    if off:
        worst = min(off, key=lambda row: row.pearson)
        failures.append(
            f"{worst.what}, {worst.document}, position {worst.position}: Pearson {worst.pearson:.4f} < {NATIVE_PEARSON}"
        )
    if rows and (share := fmean(row.overlap[10] for row in rows)) < NATIVE_TOP10:
        failures.append(f"native top-10 overlap {share:.3f} < {NATIVE_TOP10}")
    return Verdict(rows, failures, notes)


def _unusable(native: NativeRow, visible: int) -> str | None:
    """Why a stored row cannot be what an indexer computed; None when it can."""
    if len(native.logits) != visible:
        return f"{len(native.logits)} logits are stored, {visible} chunks were visible"
    parts = [part for part in vars(native).values() if part is not None]
    return None if all(bool(part.isfinite().all()) for part in parts) else "NaN or infinity is stored"


def _compare_native(
    store: TraceStore, document: TraceDocument, layer: int, row: int, native: NativeRow, weights: LayerWeights | None
) -> Agreement:
    if weights is None:
        query, scales = _stored_query(store, native)
    else:
        query, scales = _native_query(store, weights, document, layer, row)
    keys = document.keys(layer)[: len(native.logits)]  # a dump may lack the keys of the newest chunks
    reference = match(query[None], scales[None], keys)[0]
    stored = native.logits[: len(keys)].double().numpy()
    return Agreement.between(f"native, layer {layer}", document, row, reference, stored, slack=0.0)


def _stored_query(store: TraceStore, native: NativeRow) -> tuple[np.ndarray, np.ndarray]:
    if native.query is None or native.weights is None:
        raise InputError(f"{store.root}: the traces keep logits but no queries; pass --native with the backbone")
    query, scales = native.query.double().numpy(), native.weights.double().numpy()
    if store.manifest.backbone.fingerprint == V4_FLASH.fingerprint:
        # The release's server folds the fp8 scale of each query head into the head's weight.
        scales = scales / (np.maximum(np.abs(query).max(axis=1), 1e-4) / 448)
    return query, scales


def _native_query(
    store: TraceStore, weights: LayerWeights, document: TraceDocument, layer: int, row: int
) -> tuple[np.ndarray, np.ndarray]:
    """(query [H, d] after RoPE and Hadamard, head weights [H]) of the native indexer."""
    info, parts = store.manifest.backbone, {name: value.double().numpy() for name, value in vars(weights).items()}
    if (weights.hidden, weights.width) != (info.hidden, info.key_width):
        raise InputError(
            f"the checkpoint's hidden and key width are {weights.hidden}, {weights.width}, not the traces'"
        )
    state = document.hidden(layer)[row].double().numpy()
    latent = parts["wq_a"] @ state
    latent = latent / np.sqrt(np.mean(latent**2) + 1e-6) * parts["q_norm"]
    query = (parts["wq_b"] @ latent).reshape(1, weights.heads, weights.width)
    assert info.rope is not None  # native indexers are DeepSeek-V4's, whose queries turn
    query = rotated(query, document.positions[row : row + 1].numpy(), info.rope)[0] @ sylvester(weights.width)
    return query, parts["weights_proj"] @ state / np.sqrt(weights.width * weights.heads)


def verify_indexer(indexer: MemoryIndexer, store: TraceStore) -> Verdict:
    """Scores of the first, the middle and the last query token of every document against the float64 reference.

    Raises InputError when the traces are not the indexer's, or none of these tokens sees a chunk.
    """
    check_traces(indexer, store)
    rows, unseeing = [], 0
    for document in store:
        keys = torch.stack([document.keys(layer) for layer in indexer.spec.layers], dim=1)
        for row in sorted({0, len(document.positions) // 2, len(document.positions) - 1}):
            position = document.positions[row : row + 1]
            visible = min(document.trace.chunking.visible(int(position)), len(keys))
            if not visible:
                unseeing += 1
                continue
            hidden = torch.stack([document.hidden(layer)[row].float() for layer in indexer.spec.layers])[None]
            found = indexer.joined_scores(hidden, keys[:visible], position)[0].double().cpu().numpy()
            reference = reference_scores(indexer, hidden, keys[:visible], position)[0]
            rows.append(Agreement.between("indexer, joined", document, row, found, reference, slack=ERROR))
    notes = [f"skipped: {unseeing} query tokens to which no chunk is visible yet"] if unseeing else []
    if not rows:
        raise InputError(". ".join([f"{store.root}: there is no score to verify", *notes]))
    failures = [
        f"{row.what}, {row.document}, position {row.position}: error {row.error:.1e} > {ERROR:.0e}"
        for row in rows
        if not row.error <= ERROR or min(row.overlap.values()) < 1
    ]
    return Verdict(rows, failures, notes)


def verdict_table(rows: list[Agreement]) -> str:
    """A line for each thing compared: worst correlation, mean overlaps, largest error."""
    header = ["compared", "tokens", "chunks", "Pearson (worst)", *(f"top-{k}" for k in TOP), "error (worst)"]
    lines = []
    for what in dict.fromkeys(row.what for row in rows):
        found = [row for row in rows if row.what == what]
        overlaps = [fmean(row.overlap[k] for row in found) for k in TOP]
        worst, error = min(row.pearson for row in found), max(row.error for row in found)
        lines.append([what, len(found), max(row.chunks for row in found), f"{worst:.5f}", *overlaps, f"{error:.1e}"])
    return str(Table(header, lines))
