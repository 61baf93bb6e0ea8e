"""Votes: chunks that several layers agree on. The release's labels, of the backbone's own indexers, and their like."""

from dataclasses import dataclass
from typing import Self

import torch

from data_gen.chunks import Chunking
from data_gen.oracle import SparseAttention, WindowLabels, candidates

TOP_P = 0.6
"""Share of the softmax over a layer's top-k logits that its picks cover."""


def native_picks(logits: torch.Tensor, visible: torch.Tensor, top_k: int) -> torch.Tensor:
    """One layer's picks by the release's rule. logits: [R, N] fp32; visible: [R] chunks. Returns [R, N] bool.

    Softmax over the top-k visible logits; in descending order, what stays within a cumulated TOP_P, always the first,
    then one more: the chunk that crosses (when the first alone exceeds TOP_P, the second counts as the crossing one).
    """
    chunks = logits.shape[1]
    hidden = torch.arange(chunks, device=logits.device) >= visible[:, None]
    best, order = logits.masked_fill(hidden, -torch.inf).topk(min(top_k, chunks), dim=1)
    within = best.softmax(dim=1).nan_to_num(0.0).cumsum(dim=1) <= TOP_P
    within[:, :1] = True
    taken = torch.cat([torch.ones_like(within[:, :1]), within[:, :-1]], dim=1)  # a prefix: the next one crosses
    return torch.zeros_like(hidden).scatter_(1, order, taken) & ~hidden


@dataclass(frozen=True)
class GoldenChunks:
    """Golden chunks of T query tokens, CSR over tokens.

    pointers: [T + 1] int64; chunks: [M] int32; votes: [M] int32, how many CSA layers picked the chunk.
    """

    pointers: torch.Tensor
    chunks: torch.Tensor
    votes: torch.Tensor

    @classmethod
    def from_votes(cls, votes: torch.Tensor, least: int) -> Self:
        """votes: [T, N], layers that picked each chunk; those with at least `least` are golden."""
        golden = votes >= least
        pointers = torch.nn.functional.pad(golden.sum(dim=1).cumsum(0), (1, 0))
        return cls(pointers.cpu(), golden.nonzero()[:, 1].to("cpu", torch.int32), votes[golden].to("cpu", torch.int32))

    @classmethod
    def concatenate(cls, pieces: list[Self]) -> Self:
        """One after the other."""
        counts = torch.cat([piece.pointers.diff() for piece in pieces])
        pointers = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(pointers, torch.cat([p.chunks for p in pieces]), torch.cat([p.votes for p in pieces]))

    def window_labels(
        self, positions: torch.Tensor, windows: torch.Tensor, chunking: Chunking, chunks: int
    ) -> WindowLabels:
        """Pool over lookahead windows ([W, 2] rows); `chunks` is N.

        peak: the most votes of any token in the window; mass: the share of all the window's votes that a chunk got, so
        that mass recall is the share of votes served. Nothing was left out: rest is zero.
        """
        total = torch.zeros(len(windows), chunks)
        peak = torch.zeros(len(windows), chunks)
        for row, (first, last) in enumerate(windows.tolist()):
            found = slice(int(self.pointers[first]), int(self.pointers[last]))
            index, votes = self.chunks[found].long(), self.votes[found].float()
            total[row].index_add_(0, index, votes)
            peak[row].scatter_reduce_(0, index, votes, "amax")
        candidate = candidates(positions[windows[:, 0]], chunking, chunks)
        mass = total / total.sum(dim=1, keepdim=True).clamp_min(1)
        return WindowLabels(mass * candidate, peak * candidate, candidate, torch.zeros(len(windows)))


def top_p_votes(attention: SparseAttention, top_p: float, least: int) -> GoldenChunks:
    """The release's kind of label made of attention probabilities.

    Every layer picks its chunks in descending order of the head-mean probability until they hold `top_p` of what was
    stored of the query token, the crossing one included; chunks with at least `least` picks are golden.
    """
    pointers, rows = attention.pointers, torch.repeat_interleave(attention.pointers.diff())
    mass = attention.mean.double()  # in which sums of fp16 are exact
    order = mass.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, rows[order].argsort(dim=0, stable=True))  # token by token, each in descending order
    sums = torch.nn.functional.pad(mass.gather(0, order).cumsum(dim=0), (0, 0, 1, 0))
    before, total = sums[:-1] - sums[pointers[rows]], (sums[pointers[1:]] - sums[pointers[:-1]])[rows]
    votes = torch.zeros_like(order).scatter_(0, order, (before < top_p * total).long()).sum(dim=1)
    golden = votes >= least
    kept = torch.nn.functional.pad(golden.cumsum(dim=0), (1, 0))[pointers]
    return GoldenChunks(kept, attention.chunks[golden], votes[golden].to(torch.int32))
