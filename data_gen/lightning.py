"""The lightning indexer's score, sum_h w_h relu(q_h . k): the backbone's own and the memory indexer's alike."""

import torch

from data_gen.oracle import TILE_ELEMENTS

CACHE_ELEMENTS = 1 << 18
"""Matches of queries and keys held in the CPU's cache at once (1 MiB in fp32)."""
CACHE_ROWS = 1024
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
    size = TILE_ELEMENTS if keys.is_cuda else CACHE_ELEMENTS
    rows = max(1, CACHE_ROWS // weights.shape[1]) if not keys.is_cuda else max(1, len(query))
    step = max(1, size // max(1, min(rows, len(query)) * weights.shape[1]))
    for tile_rows in range(0, len(query), rows):
        some = slice(tile_rows, tile_rows + rows)
        packed, share = query[some].float().flatten(0, 1), weights[some, None].float()
        for first in range(0, len(keys), step):
            tile = slice(first, first + step)
            match = torch.mm(packed, keys[tile].float().T).relu_().unflatten(0, share.shape[::2])
            torch.bmm(share, match, out=scores[some, None, tile])
    return scores
