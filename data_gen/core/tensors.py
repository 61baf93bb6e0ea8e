"""Tensor arithmetic that everybody shares: products, the lightning indexer's score, checks of values, sets of integers.

On CPUs with AVX-512 oneDNN's products are used: PyTorch's default library leaves it unused on AMD processors, and half
of their speed with it. On others the default library is a little faster.
"""

from collections.abc import Callable

import numpy as np
import torch

from data_gen.core.errors import InputError

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
TILE_ELEMENTS = 1 << 24
"""Scores held at once (64 MiB in fp32): the key tile shrinks as heads and rows grow."""
CACHE_ELEMENTS = 1 << 18
"""Matches of queries and keys held in the CPU's cache at once (1 MiB in fp32)."""
CACHE_ROWS = 512
"""Heads times queries of such a tile: enough for the matrix product to run at full speed."""


def require(holds: torch.Tensor, message: Callable[[], str]) -> None:
    """Raise InputError unless all of `holds` (bool) is true; the message is made only then.

    A GPU is not waited for: there the assertion fails on the device, and the program at its next wait.
    """
    if not holds.is_cpu:
        failed = "a check of values failed on the device; on the CPU it says which"
        torch._assert_async(holds.all(), failed)  # pyright: ignore[reportPrivateImportUsage] - no public name has it
    elif not bool(holds.all()):
        raise InputError(message())


def product(x: torch.Tensor, weight: torch.Tensor, relu: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T, negative values set to zero if asked. x: [M, K]; weight: [N, K]. Returns [M, N].

    out: [M, N], memory that may be used for the result: a loop need not ask the system for more each time.
    """
    if ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel():  # it refuses empty sums
        found = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), None, "none", [], "")
    else:
        found = torch.mm(x, weight.T, out=out)
    return found.relu_() if relu else found  # oneDNN's own turns NaN into zero


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Rows (or columns) with gaps between them would be multiplied by a slow reference kernel."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


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
    """(stable ascending order, whether each value in that order is a new one) of integers that are not negative.

    Sorted in digits of 16 bits: numpy sorts those by radix, ten times as fast as wider integers.
    """
    digits, rest = [values.astype(np.uint16)], values >> 16
    while rest.any():
        digits, rest = [*digits, rest.astype(np.uint16)], rest >> 16
    order = np.lexsort(digits) if len(digits) > 1 else digits[0].argsort(kind="stable")
    ascending, new = values[order], np.ones(len(values), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    return order, new


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """np.unique of integers that are not negative, with its inverse, faster."""
    order, new = ranked(values)
    which = np.empty(len(values), np.int64)
    which[order] = new.cumsum() - 1
    return values[order[new]], which
