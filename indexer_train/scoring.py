"""The score of the memory indexer: one implementation for training, evaluation and decoding.

z_ts = exp(a_t) * (sum_h w_th relu(q_th . k_s) + sum_p u_tp bump_p(log2 distance)) - b_t + bias
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from data_gen.core.cpu import product
from data_gen.core.tensors import lightning_scores, tiled_scores

TILE_ELEMENTS = 1 << 15
"""Matches of candidates held in the CPU's cache at once (128 KiB in fp32)."""


@dataclass(frozen=True)
class PackedQuery:
    """Where each part of one layer's packed query lies.

    A packed query is [heads * width + heads + bumps + scale + slot + bias]: q head by head (rotated), head weights w
    (already scaled by (width * heads)^-0.5), bump weights u, log-scale a, slot logit b, bias; parts that an indexer
    lacks have size zero.
    """

    heads: int
    width: int
    bumps: int
    scale: bool
    slot: bool
    bias: bool

    @property
    def sizes(self) -> list[int]:
        """Columns of each part, in order."""
        return [self.heads * self.width, self.heads, self.bumps, int(self.scale), int(self.slot), int(self.bias)]

    @property
    def size(self) -> int:
        """Columns of one layer."""
        return sum(self.sizes)

    def logits(
        self, packed: torch.Tensor, keys: torch.Tensor, distance: torch.Tensor, candidates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One layer's logits z of every chunk.

        packed: [B, size] fp32; keys: [N, width], whose dtype is that of the products with them; distance: [B, N] tokens
        from the chunk's first token to the query, at least 1. Returns [B, N] fp32; with candidates [B, M], rows of
        `keys`, only theirs, and distance is [B, M] too.
        """
        q, weights, bumps, log_scale, slot, bias = packed.split(self.sizes, dim=-1)
        q, weights = q.unflatten(-1, (self.heads, self.width)).to(keys.dtype), weights.to(keys.dtype)
        if candidates is not None:
            logits = CandidateScores.apply(q, weights, keys, candidates).float()
        elif packed.requires_grad:
            logits = lightning_scores(q, weights, keys).float()
        else:
            logits = tiled_scores(q, weights, keys)
        if self.bumps:
            logits = logits + torch.einsum("bnp,bp->bn", distance_bumps(distance, self.bumps), bumps)
        if self.scale:
            logits = logits * log_scale.exp()
        if self.slot:
            logits = logits - slot
        return logits + bias if self.bias else logits

    def surrogate(self, packed: torch.Tensor) -> torch.Tensor:
        """exp(a) sum_h w_h q_h: [B, size] -> [B, width]."""
        q, weights, _, log_scale, _, _ = packed.split(self.sizes, dim=-1)
        linear = torch.einsum("bhd,bh->bd", q.unflatten(-1, (self.heads, self.width)), weights)
        return linear * log_scale.exp() if self.scale else linear


class CandidateScores(torch.autograd.Function):
    """`lightning_scores` of each query's own candidates: sum_h w_h relu(q_h . k).

    query: [B, H, d]; weights: [B, H]; keys: [N, d], frozen; candidates: [B, M], rows of `keys`. Returns [B, M].
    Queries are taken a few at a time, so that each match [H, M] is used while it is in the cache; what is kept for
    the gradient is one match, and the head weights come in after the product, on [H, d].
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor
    ) -> torch.Tensor:
        scores, matches = query.new_empty(candidates.shape), []
        for rows in _tiles(candidates, query.shape[1]):
            matches.append(_products(query[rows], _gather(keys, candidates[rows]), relu=True))
            torch.bmm(weights[rows, None], matches[-1], out=scores[rows, None])
        ctx.save_for_backward(weights, keys, candidates, *matches)
        return scores

    @staticmethod
    @once_differentiable  # loses the name of its first parameter, which the base class has
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        weights, keys, candidates, *matches = ctx.saved_tensors
        query_gradient, weights_gradient = keys.new_empty(*weights.shape, keys.shape[1]), torch.empty_like(weights)
        for rows, match in zip(_tiles(candidates, weights.shape[1]), matches, strict=True):
            slope = match.sign().mul_(gradient[rows, None])
            summed = _products(slope, _gather(keys, candidates[rows]).mT)
            torch.mul(summed, weights[rows, :, None], out=query_gradient[rows])
            torch.bmm(match, gradient[rows, :, None], out=weights_gradient[rows, :, None])
        return query_gradient, weights_gradient, None, None


def _products(x: torch.Tensor, y: torch.Tensor, relu: bool = False) -> torch.Tensor:
    """x[b] y[b]^T for every b, negative values set to zero if asked; of one b by the fastest library.

    x: [B, M, K]; y: [B, N, K]. Returns [B, M, N].
    """
    if len(x) == 1:
        return product(x[0], y[0], relu)[None]
    found = torch.bmm(x, y.mT, out=x.new_empty(len(x), x.shape[1], y.shape[1]))  # so that autocast leaves its type
    return found.relu_() if relu else found


def _gather(keys: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """keys[rows], as the CPU does it fast. keys: [N, d]; rows: [B, M] -> [B, M, d]."""
    return keys.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _tiles(candidates: torch.Tensor, heads: int) -> Iterator[slice]:
    """Runs of queries: one to a few on the CPU, whose cache they share; all at once on a GPU."""
    count, width = candidates.shape
    step = max(1, TILE_ELEMENTS // max(1, heads * width)) if candidates.is_cpu else max(1, count)
    for first in range(0, count, step):
        yield slice(first, first + step)


def distance_bumps(distance: torch.Tensor, count: int) -> torch.Tensor:
    """Triangular bumps on log2 distance, one wide, centred on 4, 5, 6 ... so that 12 of them reach 32K tokens.

    distance: [...], in tokens, at least 1. Returns [..., count], in [0, 1]; beyond the last centre the last bump stays
    at one, so that longer contexts than those trained on score like the longest.
    """
    centres = torch.arange(4, 4 + count, device=distance.device, dtype=torch.float32)
    position = distance.float().log2().clamp(4.0, 3.0 + count)
    return (1 - (position[..., None] - centres).abs()).clamp_min(0)


def join_layers(logits: torch.Tensor, join: str) -> torch.Tensor:
    """The joined score of each chunk from the layers' logits: [L, B, N] -> [B, N] by `sum`, `mean` or `max`."""
    if join == "max":
        return logits.amax(dim=0)
    return logits.sum(dim=0) if join == "sum" else logits.mean(dim=0)


def ranking(scores: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Chunks from the best to the worst, ties older first, those that are not candidates last: [W, N] int64.

    On the CPU the score's bits, made to sort downwards, and the chunk share one integer, so that NumPy's vectorised
    sort gives the order that a stable argsort does, much faster.
    """
    scores = scores.masked_fill(~candidate, -torch.inf)
    if scores.is_cuda or scores.dtype != torch.float32:
        return scores.argsort(dim=1, descending=True, stable=True)
    bits = (scores + 0.0).view(torch.int32)  # one zero: -0 and 0 are a tie
    upwards = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = ((~upwards).long() << 32) | torch.arange(scores.shape[1])
    packed.numpy().sort(axis=1)
    return packed.bitwise_and_(0xFFFFFFFF)


def select(scores: torch.Tensor, candidate: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mark the `kept` best candidates of each row (all of them when there are fewer); ties go to the older chunk.

    scores: [W, N]; candidate: [W, N] bool; kept: [W] int. Returns [W, N] bool.
    """
    order = ranking(scores, candidate)
    taken = torch.arange(scores.shape[1], device=scores.device) < kept[:, None]
    return torch.zeros_like(candidate).scatter_(1, order, taken) & candidate


def remaining(scores: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """What each candidate and all that rank below it have of the softmax over the candidates, ties as in `ranking`.

    scores: [W, N]; candidate: [W, N] bool. Returns [W, N] fp64: 1 for the best candidate, 0 for what is none. Summed
    from the worst upwards, so that small shares are not lost beside a large one.
    """
    order = ranking(scores, candidate)
    shares = scores.double().masked_fill(~candidate, -torch.inf).softmax(dim=1).gather(1, order)
    rest = shares.flip(1).cumsum(dim=1).flip(1)
    return torch.zeros_like(rest).scatter_(1, order, rest / rest[:, :1]).masked_fill(~candidate, 0.0)


def covering(scores: torch.Tensor, candidate: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the fewest best candidates of each row that have `share` of the softmax over all: [W, N] bool.

    The best is marked in any case: its remainder is 1.
    """
    return candidate & (remaining(scores, candidate) > 1 - max(share, torch.finfo(torch.float64).eps))


def above(scores: torch.Tensor, candidate: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """Mark the candidates with a score of at least `threshold`, one number or [W, 1]: [W, N] bool."""
    return candidate & (scores >= threshold)
