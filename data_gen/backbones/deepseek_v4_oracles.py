"""The two oracles on DeepSeek-V4, fed layer by layer, piece by piece; memory is that of one piece."""

from typing import Protocol

import torch

from data_gen.core.errors import InputError
from data_gen.traces.labels import GoldenChunks, SparseAttention, native_picks

NEAR = 1e-4
"""Scores closer than this share of a row's largest are a tie that rounding may break either way."""


class CsaOracle(Protocol):
    """Collects one document; R query tokens and N chunks so far in a piece."""

    def add(self, scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, attention: torch.Tensor) -> None:
        """One layer of the current piece.

        scores: [R, N] native logits; visible: [R] chunks; picks: [R, k], -1 for none; attention: [heads, R, N].
        """
        ...

    def end_piece(self) -> None:
        """All CSA layers of the piece were added."""
        ...

    def finish(self) -> GoldenChunks | SparseAttention:
        """The whole document."""
        ...


class IndexerOracle:
    """The release's labels: votes of the native indexers."""

    def __init__(self, top_k: int, votes: int) -> None:
        self.top_k, self.least = top_k, votes
        self.votes: torch.Tensor | None = None
        self.pieces: list[GoldenChunks] = []

    def add(self, scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, attention: torch.Tensor) -> None:
        picked = native_picks(scores, visible, self.top_k).to(torch.int16)
        self.votes = picked if self.votes is None else self.votes + picked.to(self.votes.device)

    def end_piece(self) -> None:
        if self.votes is not None:
            self.pieces.append(GoldenChunks.from_votes(self.votes, self.least))
        self.votes = None

    def finish(self) -> GoldenChunks:
        return GoldenChunks.concatenate(self.pieces)


class AttentionOracle:
    """Core attention probabilities, which are zero but for each layer's picks: kept sparse throughout.

    top: chunks kept of each query token, by head-maximum probability averaged over layers.
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self.layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.chunks = 0
        self.pieces: list[SparseAttention] = []

    def add(self, scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, attention: torch.Tensor) -> None:
        self.chunks = scores.shape[1]
        index = picks.clamp_min(0)
        probability = attention.gather(2, index.expand(len(attention), -1, -1)).float() * (picks >= 0)
        first = self.layers[0][0].device if self.layers else index.device  # layers may lie on several
        self.layers.append((index.to(first), probability.mean(dim=0).to(first), probability.amax(dim=0).to(first)))

    def end_piece(self) -> None:
        if self.layers:
            self.pieces.append(self._piece())
        self.layers = []

    def _piece(self) -> SparseAttention:
        rows = len(self.layers[0][0])
        ranking = torch.zeros(rows, self.chunks, device=self.layers[0][0].device)
        for index, _, peak in self.layers:
            ranking.scatter_add_(1, index, peak)
        best = ranking.topk(min(self.top, self.chunks), dim=1)
        kept = torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, best.indices, best.values > 0)
        row, chunk = kept.nonzero(as_tuple=True)
        slot = torch.full_like(ranking, -1, dtype=torch.int64)
        slot[row, chunk] = torch.arange(len(row), device=row.device)
        means, peaks = torch.zeros(2, len(row), len(self.layers), device=row.device)
        total = torch.zeros(rows, device=row.device)
        for layer, (index, mean, peak) in enumerate(self.layers):
            target = slot.gather(1, index)
            found = (target >= 0) & (peak > 0)
            means[target[found], layer], peaks[target[found], layer] = mean[found], peak[found]
            total += mean.sum(dim=1) / len(self.layers)
        stored = torch.zeros_like(total).index_add_(0, row, means.mean(dim=1))
        pointers = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0))
        return SparseAttention(
            pointers.cpu(),
            chunk.to("cpu", torch.int32),
            means.half().cpu(),
            peaks.half().cpu(),
            (total - stored).clamp_min(0).cpu(),
        )

    def finish(self) -> SparseAttention:
        return SparseAttention.concatenate(self.pieces)


def count_near_ties(scores: torch.Tensor, visible: torch.Tensor, picks: torch.Tensor, where: str) -> int:
    """Rows whose recomputed top-k differs from the backbone's own picks by ties at the cut alone.

    scores: [R, N] recomputed; visible: [R]; picks: [R, k], -1 for none. Raises InputError on any other difference:
    then the indexer computes something that the tracer does not know, and every label would be wrong.
    """
    rows, chunks = scores.shape
    if not chunks:
        return 0
    seen = torch.arange(chunks, device=scores.device) < visible[:, None]
    theirs = torch.zeros(rows, chunks + 1, dtype=torch.bool, device=scores.device)
    theirs = theirs.scatter_(1, torch.where(picks >= 0, picks, chunks), True)[:, :chunks]
    best = scores.masked_fill(~seen, -torch.inf).topk(min(picks.shape[1], chunks), dim=1)
    ours = torch.zeros_like(theirs).scatter_(1, best.indices, True) & seen
    cut = best.values.masked_fill(best.values == -torch.inf, torch.inf).amin(dim=1, keepdim=True)
    near = NEAR * scores.abs().masked_fill(~seen, 0).amax(dim=1, keepdim=True)
    differ = ours ^ theirs
    wrong = (differ & ~((scores - cut).abs() <= near)).any(dim=1) | (ours.sum(dim=1) != theirs.sum(dim=1))
    if bool(wrong.any()):
        raise InputError(
            f"{where}: the recomputed top-{picks.shape[1]} differs from the backbone's own picks at {int(wrong.sum())} "
            "tokens; its indexer has a term that the tracer does not know"
        )
    return int(differ.any(dim=1).sum())
