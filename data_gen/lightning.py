"""The lightning indexer's score, sum_h w_h relu(q_h . k): the backbone's own and the memory indexer's alike."""

import torch

from data_gen.oracle import TILE_ELEMENTS


def lightning_scores(query: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query: [B, H, d]; weights: [B, H], already scaled by (H d)^-0.5; keys: [N, d] -> [B, N]."""
    match = torch.relu(query.flatten(0, 1) @ keys.T).unflatten(0, query.shape[:2])
    return torch.einsum("bhn,bh->bn", match, weights)


def tiled_scores(query: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`lightning_scores` in key tiles: beside the result [B, N] fp32, memory does not grow with N."""
    scores = torch.empty(len(query), len(keys), device=keys.device)
    step = max(1, TILE_ELEMENTS // max(1, weights.numel()))
    for first in range(0, len(keys), step):
        tile = slice(first, first + step)
        scores[:, tile] = lightning_scores(query.float(), weights.float(), keys[tile].float())
    return scores
