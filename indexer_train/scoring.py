"""The score of the memory indexer: one implementation for training, evaluation and decoding.

z_ts = exp(a_t) * (sum_h w_th relu(q_th . k_s) + sum_p u_tp bump_p(log2 distance)) - b_t + bias
"""

from dataclasses import dataclass

import torch

from data_gen.lightning import lightning_scores


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
        return [self.heads * self.width, self.heads, self.bumps, int(self.scale), int(self.slot), int(self.bias)]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def score(self, packed: torch.Tensor, keys: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Logits z of every chunk.

        packed: [B, size]; keys: [N, width], or each query's own [B, N, width]; distance: [B, N] tokens from the
        chunk's first token to the query, at least 1. Returns [B, N].
        """
        q, weights, bumps, log_scale, slot, bias = packed.split(self.sizes, dim=-1)
        logits = lightning_scores(q.unflatten(-1, (self.heads, self.width)), weights, keys)
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


def distance_bumps(distance: torch.Tensor, count: int) -> torch.Tensor:
    """Triangular bumps on log2 distance, one wide, centred on 4, 5, 6 ... so that 12 of them reach 32K tokens.

    distance: [...], in tokens, at least 1. Returns [..., count], in [0, 1]; beyond the last centre the last bump stays
    at one, so that longer contexts than those trained on score like the longest.
    """
    centres = torch.arange(4, 4 + count, device=distance.device, dtype=torch.float32)
    position = distance.float().log2().clamp(4.0, 3.0 + count)
    return (1 - (position[..., None] - centres).abs()).clamp_min(0)


def join_layers(logits: torch.Tensor, join: str) -> torch.Tensor:
    """One score per chunk from the layers' logits: [L, B, N] -> [B, N] by `sum`, `mean` or `max`."""
    if join == "max":
        return logits.amax(dim=0)
    return logits.sum(dim=0) if join == "sum" else logits.mean(dim=0)


def select(scores: torch.Tensor, candidate: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mark the `kept` best candidates of each row (all of them when there are fewer); ties go to the older chunk.

    scores: [W, N]; candidate: [W, N] bool; kept: [W] int. Returns [W, N] bool.
    """
    order = scores.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(scores.shape[1], device=scores.device) < kept[:, None]
    return torch.zeros_like(candidate).scatter_(1, order, taken) & candidate


def above(scores: torch.Tensor, candidate: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mark the candidates with a score of at least `threshold`: [W, N] bool."""
    return candidate & (scores >= threshold)
