"""One document as serving goes through it: which chunks scored high, which were kept, which were needed."""

from typing import Any

import torch

from data_gen.traces.store import TraceDocument, TraceStore
from eval.offline.policies import golden_tokens
from eval.offline.recall import in_pieces
from indexer_train.measure.metrics import DocumentScorer, ServedWindows
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import ranking, select

WINDOWS = 12
"""Windows shown at most."""
BINS = 256
"""Rows of the picture: chunks of longer documents share one."""


def timeline(indexer: MemoryIndexer, store: TraceStore, golden: float, budget: float) -> dict[str, Any] | None:
    """The document with the most windows (then the most golden chunks), its first WINDOWS of them; None without any.

    windows: per refresh the tokens it serves (`first`, `last`, positions), the unprotected `candidates` [first, last),
    the `kept` ones, and `ranks`: per bin of `bin_chunks` chunks the best rank among candidates, 100 the best, 0 none.
    needed: [position, chunk, kept] of every chunk that a token finds golden, kept 1 or 0; protected ones left out.
    """
    documents = [(document, document.windows(serving=True)) for document in store]
    most = max(len(windows) for _, windows in documents)
    if not most:
        return None

    def needs(found: tuple[TraceDocument, torch.Tensor]) -> int:
        return sum(int(served.labels.golden(golden).sum()) for served in in_pieces(*found))

    document, windows = max((each for each in documents if len(each[1]) == most), key=needs)
    served = ServedWindows.of(document, windows[:WINDOWS])
    candidate = served.labels.candidate
    scores = DocumentScorer(indexer, served.document).joined_scores(served)
    chosen = select(scores, candidate, served.kept(budget))
    bin_chunks = -(-document.chunks // BINS)
    ranks = _pooled(_percentile(scores, candidate), bin_chunks)
    windows, needed = [], []
    for row, (first, last) in enumerate(served.windows.tolist()):
        inside = candidate[row].nonzero()[:, 0]
        windows.append(
            {
                "first": int(document.positions[first]),
                "last": int(document.positions[last - 1]),
                "candidates": [int(inside[0]), int(inside[-1]) + 1],
                "kept": chosen[row].nonzero()[:, 0].tolist(),
                "ranks": ranks[row].tolist(),
            }
        )
        needed += _needed(document, golden, range(first, last), candidate[row], chosen[row])
    meta = document.meta
    return {
        "document": meta.name,
        "task": meta.task,
        "length": meta.length,
        "chunk_tokens": served.chunking.tokens,
        "chunks": document.chunks,
        "bin_chunks": bin_chunks,
        "budget": budget,
        "windows": windows,
        "needed": needed,
    }


def _needed(
    document: TraceDocument, golden: float, rows: range, candidate: torch.Tensor, chosen: torch.Tensor
) -> list[list[int]]:
    ends, chunks = golden_tokens(document, golden)
    found = []
    for row in rows:
        for chunk in chunks[ends[row] : ends[row + 1]].tolist():
            if candidate[chunk]:
                found.append([int(document.positions[row]), chunk, int(chosen[chunk])])
    return found


def _percentile(scores: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """[W, N] -> 100 for the best candidate of a row, down to nearly 0; 0 where there is no candidate."""
    order = ranking(scores, candidate)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    return (100 * (1 - place / candidate.sum(dim=1, keepdim=True))) * candidate


def _pooled(values: torch.Tensor, size: int) -> torch.Tensor:
    """Maxima over `size` neighbours: [W, N] -> [W, ceil(N / size)] int."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size))
    return padded.unflatten(1, (-1, size)).amax(dim=2).ceil().int()
