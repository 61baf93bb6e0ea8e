"""Tensor arithmetic that everybody shares: the lightning indexer's score, checks of values, sets of integers."""

from collections.abc import Callable

import numpy as np
import torch

from data_gen.core.cpu import CACHE_ELEMENTS, product
from data_gen.core.errors import InputError

TILE_ELEMENTS = 1 << 24
"""Scores held at once on a GPU (64 MiB in fp32)."""
CACHE_ROWS = 512
"""Heads times queries of such a tile: enough for the matrix product to run at full speed."""


def require(holds: torch.Tensor, message: Callable[[], str]) -> None:
    """Raise InputError unless all of `holds` (bool, any shape) is true; the message is made only then.

    A GPU is not waited for: there the assertion fails on the device, and the program at its next wait.
    """
    if not holds.is_cpu:
        failed = "a check of values failed on the device; on the CPU it says which"
        torch._assert_async(holds.all(), failed)  # pyright: ignore[reportPrivateImportUsage] - no public name has it
    elif not bool(holds.all()):
        raise InputError(message())


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """values [...] there. From the CPU to a GPU nobody waits: it takes them from pinned memory, in its work's order."""
    if values.is_cpu and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


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


def ranges(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """begin[0] .. end[0] - 1, begin[1] .. end[1] - 1 and so on, one after the other."""
    counts = end - begin
    return np.arange(counts.sum()) + np.repeat(end - counts.cumsum(), counts)


def ranked(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stable ascending order, whether each value in that order is a new one) of integers that are not negative, [n].

    Sorted in digits of 16 bits: numpy sorts those by radix, much faster than wider integers.
    """
    digits, rest = [values.astype(np.uint16)], values >> 16
    while rest.any():
        digits, rest = [*digits, rest.astype(np.uint16)], rest >> 16
    order = np.lexsort(digits) if len(digits) > 1 else digits[0].argsort(kind="stable")
    ascending, new = values[order], np.ones(len(values), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    return order, new


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique of integers [n] that are not negative, with its inverse [n], faster."""
    order, new = ranked(values)
    which = np.empty(len(values), np.int64)
    which[order] = new.cumsum() - 1
    return values[order[new]], which
