"""Recompute logits in float64: what the backbone's own indexer stored in a trace, and what a trained one scores."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from data_gen.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.store import TraceDocument, TraceStore
from data_gen.trace import NativeRow
from eval.reference import match, reference_scores, rotated, sylvester
from eval.report import table
from indexer_train.bridge.native import read_native
from indexer_train.bridge.weights import LayerWeights
from indexer_train.model import MemoryIndexer
from indexer_train.trainer import check_traces

TOP = (10, 20, 50, 512, 1024)
NATIVE_PEARSON, NATIVE_TOP10 = 0.99, 0.9
"""Native logits pass when every token correlates and the best ten agree on average: keys (and the release's queries)
were rounded to fp8, logits and hidden states to bf16."""
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
    """rows: what was compared; failures: one line for each thing that is off, empty when all is well."""

    rows: list[Agreement]
    failures: list[str]


def verify_native(store: TraceStore, checkpoint: Path | None) -> Verdict:
    """Stored native logits against hidden states, keys and the backbone's own indexer weights at `checkpoint`.

    Without a checkpoint the stored queries and head weights take their place: that proves keys and scoring only.
    Raises InputError when the traces keep no logits, or neither a checkpoint nor queries are there.
    """
    layers = store.manifest.trace.layers
    weights = None if checkpoint is None else read_native(checkpoint, layers)
    rows = [row for document in store for layer in layers for row in _native_rows(store, document, layer, weights)]
    if not rows:
        raise InputError(f"{store.root}: the traces keep no native logits to verify")
    failures = []
    if (worst := min(rows, key=lambda row: row.pearson)).pearson < NATIVE_PEARSON:
        failures.append(
            f"{worst.what}, {worst.document}, position {worst.position}: Pearson {worst.pearson:.4f} < {NATIVE_PEARSON}"
        )
    if (share := fmean(row.overlap[10] for row in rows)) < NATIVE_TOP10:
        failures.append(f"native top-10 overlap {share:.3f} < {NATIVE_TOP10}")
    return Verdict(rows, failures)


def _native_rows(
    store: TraceStore, document: TraceDocument, layer: int, weights: dict[int, LayerWeights] | None
) -> Iterator[Agreement]:
    keys = document.keys(layer)
    for row, native in document.native(layer).items():
        visible = min(len(native.logits), len(keys))  # a dump may lack the keys of the newest chunks
        if visible < 2:
            continue
        if weights is None:
            query, scales = _stored_query(store, native)
        else:
            query, scales = _native_query(store, weights[layer], document, layer, row)
        reference = match(query[None], scales[None], keys[:visible])[0]
        stored = native.logits[:visible].double().numpy()
        yield Agreement.between(f"native, layer {layer}", document, row, reference, stored, slack=0.0)


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
    query = rotated(query, document.positions[row : row + 1].numpy(), info.rope)[0] @ sylvester(weights.width)
    return query, parts["weights_proj"] @ state / np.sqrt(weights.width * weights.heads)


def verify_indexer(indexer: MemoryIndexer, store: TraceStore) -> Verdict:
    """Scores of the first, the middle and the last query token of every document against the float64 reference.

    Raises InputError when the traces are not the indexer's.
    """
    check_traces(indexer, store)
    rows = []
    for document in store:
        keys = torch.stack([document.keys(layer) for layer in indexer.spec.layers], dim=1)
        for row in sorted({0, len(document.positions) // 2, len(document.positions) - 1}):
            position = document.positions[row : row + 1]
            visible = document.trace.chunking.visible(int(position))
            hidden = torch.stack([document.hidden(layer)[row].float() for layer in indexer.spec.layers])[None]
            found = indexer.scores(hidden, keys[:visible], position)[0].double().cpu().numpy()
            reference = reference_scores(indexer, hidden, keys[:visible], position)[0]
            rows.append(Agreement.between("indexer, joined", document, row, found, reference, slack=ERROR))
    failures = [
        f"{row.what}, {row.document}, position {row.position}: error {row.error:.1e} > {ERROR:.0e}"
        for row in rows
        if not row.error <= ERROR or min(row.overlap.values()) < 1
    ]
    return Verdict(rows, failures)


def verdict_table(rows: list[Agreement]) -> str:
    """A line for each thing compared: worst correlation, mean overlaps, largest error."""
    header = ["compared", "tokens", "chunks", "Pearson (worst)", *(f"top-{k}" for k in TOP), "error (worst)"]
    lines = []
    for what in dict.fromkeys(row.what for row in rows):
        found = [row for row in rows if row.what == what]
        overlaps = [fmean(row.overlap[k] for row in found) for k in TOP]
        worst, error = min(row.pearson for row in found), max(row.error for row in found)
        lines.append([what, len(found), max(row.chunks for row in found), f"{worst:.5f}", *overlaps, f"{error:.1e}"])
    return table(header, lines)
