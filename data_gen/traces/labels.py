"""Oracles and the labels made of them: what the backbone's own attention used, and votes of its layers' indexers."""

from dataclasses import dataclass
from typing import Self

import torch

from data_gen.core.chunks import Chunking
from data_gen.core.tensors import TILE_ELEMENTS

TOP_P = 0.6
"""Share of the softmax over a layer's top-k logits that its picks cover."""


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    chunk_tokens: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probability per chunk, computed in key tiles, never [S, T].

    query: [H, R, d] and key: [KV, T, d], both after RoPE; positions: [R], 0-based, a query sees keys 0..position.
    softcap: tanh cap of the logits (Gemma-2); sinks: [H] extra logits of the softmax (GPT-OSS).
    Returns [H, R, ceil(T / chunk_tokens)] fp32; the denominator holds every visible token, protected or not, so rows
    sum to one (less the share of `sinks`). The last entry may belong to an unfinished chunk.
    """
    heads, rows, _ = query.shape
    kv_heads, length, _ = key.shape
    chunks = -(-length // chunk_tokens)
    query = query.float().reshape(kv_heads, -1, query.shape[-1])  # [KV, groups * R, d]
    log_mass = query.new_empty(heads, rows, chunks)
    step = max(1, TILE_ELEMENTS // (heads * rows * chunk_tokens))
    for first in range(0, chunks, step):
        last = min(chunks, first + step)
        tile = key[:, first * chunk_tokens : last * chunk_tokens].float()
        logits = (query @ tile.transpose(1, 2) * scaling).reshape(heads, rows, -1)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        index = torch.arange(first * chunk_tokens, first * chunk_tokens + tile.shape[1], device=key.device)
        logits = logits.masked_fill(index > positions[:, None], -torch.inf)
        missing = (last - first) * chunk_tokens - tile.shape[1]
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        log_mass[..., first:last] = logits.unflatten(-1, (-1, chunk_tokens)).logsumexp(dim=-1)
    total = log_mass
    if sinks is not None:
        total = torch.cat([log_mass, sinks.float().reshape(heads, 1, 1).expand(heads, rows, 1)], dim=-1)
    return (log_mass - total.logsumexp(dim=-1, keepdim=True)).exp()


@dataclass(frozen=True)
class SparseAttention:
    """Oracle probabilities of T query tokens, the top chunks of each, CSR over tokens.

    pointers: [T + 1] int64; chunks: [M] int32, ascending within a token; mean, peak: [M, layers] fp16, the chunk's
    probability averaged over, and its maximum over, the heads of each full-attention layer; rest: [T] fp32, what the
    dropped chunks held (mean over layers and heads).
    """

    pointers: torch.Tensor
    chunks: torch.Tensor
    mean: torch.Tensor
    peak: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def from_dense(cls, mean: torch.Tensor, peak: torch.Tensor, visible: torch.Tensor, top: int) -> "SparseAttention":
        """Keep the `top` complete chunks of each token by head-max probability averaged over layers.

        mean, peak: [T, N, layers]; visible: [T], complete chunks at each token.
        """
        tokens, chunks, _ = mean.shape
        complete = torch.arange(chunks) < visible[:, None]
        order = peak.mean(dim=-1).masked_fill(~complete, -1.0)
        kept = torch.zeros_like(complete).scatter_(1, order.topk(min(top, chunks), dim=1).indices, True) & complete
        pointers = torch.zeros(tokens + 1, dtype=torch.int64)
        pointers[1:] = kept.sum(dim=1).cumsum(0)
        rest = (mean.mean(dim=-1) * (complete & ~kept)).sum(dim=1)
        index = kept.nonzero()
        return cls(pointers, index[:, 1].to(torch.int32), mean[kept].half(), peak[kept].half(), rest.float())

    @classmethod
    def concatenate(cls, pieces: list[Self]) -> Self:
        """One after the other."""
        counts = torch.cat([piece.pointers.diff() for piece in pieces])
        rest = (torch.cat([getattr(p, name) for p in pieces]) for name in ("chunks", "mean", "peak", "rest"))
        return cls(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), *rest)

    def rows(self, first: int, last: int) -> Self:
        """Of the tokens `first` to one before `last`."""
        start, end = self.pointers[first].item(), self.pointers[last].item()
        stored = (getattr(self, name)[start:end] for name in ("chunks", "mean", "peak"))
        return type(self)(self.pointers[first : last + 1] - start, *stored, self.rest[first:last])

    def dense(self, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, peak), each [T, chunks] fp32, averaged over layers; zero where nothing was stored."""
        counts = self.pointers.diff()
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        index = (rows, self.chunks.long())
        mean = torch.zeros(len(counts), chunks)
        peak = torch.zeros(len(counts), chunks)
        mean[index] = self.mean.float().mean(dim=1)
        peak[index] = self.peak.float().mean(dim=1)
        return mean, peak


@dataclass(frozen=True)
class WindowLabels:
    """What each lookahead window needed, for W window starts and N chunks.

    Of the attention oracle (the indexer oracle's votes take their place in data_gen/traces/labels.py):
    mass: [W, N] fp32, attention probability averaged over heads, layers and the window's tokens;
    peak: [W, N] fp32, the window's maximum of the head-maximum probability averaged over layers.
    Of both:
    candidate: [W, N] bool, unprotected chunks visible at the start; rest: [W] fp32, mean mass that was not stored.
    """

    mass: torch.Tensor
    peak: torch.Tensor
    candidate: torch.Tensor
    rest: torch.Tensor

    def golden(self, threshold: float) -> torch.Tensor:
        """[W, N] bool: candidates whose peak reaches `threshold` anywhere in the window."""
        return self.candidate & (self.peak >= threshold)


def candidates(positions: torch.Tensor, chunking: Chunking, chunks: int) -> torch.Tensor:
    """[W, chunks] bool: unprotected chunks visible to resident sets fixed at `positions` ([W])."""
    bounds = torch.tensor([chunking.candidates(int(p)) for p in positions]).reshape(-1, 2)
    index = torch.arange(chunks)
    return (index >= bounds[:, :1]) & (index < bounds[:, 1:])


def window_labels(
    mean: torch.Tensor,
    peak: torch.Tensor,
    rest: torch.Tensor,
    positions: torch.Tensor,
    windows: torch.Tensor,
    chunking: Chunking,
) -> WindowLabels:
    """Pool the oracle over lookahead windows.

    mean, peak: [T, N] per query token; rest: [T]; positions: [T]; windows: [W, 2], first row and one past the last.
    """
    chunks = mean.shape[1]
    totals = torch.cat([mean.new_zeros(1, chunks), mean]).double().cumsum(0)
    rests = torch.cat([rest.new_zeros(1), rest]).double().cumsum(0)
    first, last = windows.unbind(1)
    length = (last - first).double()
    candidate = candidates(positions[first], chunking, chunks)
    mass = ((totals[last] - totals[first]) / length[:, None]).clamp_min(0).float()
    highest = torch.stack([peak[a:b].amax(dim=0) for a, b in windows.tolist()])
    return WindowLabels(
        mass=mass * candidate,
        peak=highest * candidate,
        candidate=candidate,
        rest=((rests[last] - rests[first]) / length).float(),
    )


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
