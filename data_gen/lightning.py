"""The lightning indexer's score, sum_h w_h relu(q_h . k): the backbone's own and the memory indexer's alike."""

import torch

from data_gen.oracle import TILE_ELEMENTS
from data_gen.products import product

CACHE_ELEMENTS = 1 << 18
"""Matches of queries and keys held in the CPU's cache at once (1 MiB in fp32)."""
CACHE_ROWS = 512
"""Heads times queries of such a tile: enough for the matrix product to run at full speed."""


def lightning_scores(query: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query: [B, H, d]; weights: [B, H], already scaled by (H d)^-0.5; keys: [N, d] -> [B, N]."""
    match = torch.relu(query.flatten(0, 1) @ keys.T).unflatten(0, query.shape[:2])
    return torch.einsum("bhn,bh->bn", match, weights)


def tiled_scores(query: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`lightning_scores` in tiles, without a gradient: beside the result [B, N] fp32, memory does not grow with B or N.

    On the CPU a tile is used while it is in the cache.
    """
    scores = torch.empty(len(query), len(keys), device=keys.device)
    if not scores.numel():
        return scores
    heads, rows, matches = query.shape[1], len(query), TILE_ELEMENTS
    if not keys.is_cuda:
        rows, matches = min(rows, max(1, CACHE_ROWS // heads)), CACHE_ELEMENTS
    step = min(len(keys), max(1, matches // (rows * heads)))
    queries = query.float().flatten(0, 1).contiguous().split(rows * heads)
    few = list(zip(queries, weights[:, None].float().split(rows), scores[:, None].split(rows), strict=True))
    memory = torch.empty(rows * heads * step, device=keys.device)
    for first in range(0, len(keys), step):
        tile = keys[first : first + step].float().contiguous()
        size = len(tile)
        for flat, weight, place in few:
            out = memory[: len(flat) * size].view(-1, size)
            match = product(flat, tile, relu=True, out=out).view(-1, heads, size)
            torch.bmm(weight, match, out=place[..., first : first + step])
    return scores
