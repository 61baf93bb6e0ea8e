"""The attention oracle: which chunks the backbone's own attention used, and the labels made of it."""

from dataclasses import dataclass
from typing import Self

import torch

from data_gen.chunks import Chunking

TILE_ELEMENTS = 1 << 24
"""Scores held at once (64 MiB in fp32): the key tile shrinks as heads and rows grow."""


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

    Of the attention oracle (the indexer oracle's votes take their place in data_gen/votes.py):
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
