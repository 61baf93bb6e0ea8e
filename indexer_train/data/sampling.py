"""Sampled candidates: the golden chunks of each query token beside drawn negatives, at a cost that N does not enter."""

import hashlib
from itertools import pairwise, starmap
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from data_gen.core.tensors import ranked
from data_gen.traces.store import TraceStore


def columns_of(index: Dataset, *names: str) -> list[np.ndarray]:
    """Columns [W] of a `window_index`, without a Python object for each of its rows."""
    table: Any = index.with_format("arrow")[:]
    return [table[name].to_numpy() for name in names]


def any_golden(store: TraceStore, index: Dataset, threshold: float) -> bool:
    """Whether any window of `index` (`window_index`) has a golden chunk; looks no further than the first."""
    numbers, firsts, lasts = columns_of(index, "document", "first", "last")
    cuts = numbers.searchsorted(np.arange(len(store) + 1)).tolist()  # a document's windows lie side by side
    for document, own in zip(store, starmap(slice, pairwise(cuts)), strict=True):
        oracle = document.oracle
        if not (oracle.peak >= threshold).any():
            continue
        for first, last in zip(firsts[own].tolist(), lasts[own].tolist(), strict=True):
            bounds = document.trace.chunking.candidates(int(document.positions[first]))
            if len(oracle.window(first, last, bounds).golden(threshold)):
                return True
    return False


def generator(*of: int) -> np.random.Generator:
    """Random numbers that are a function of `of` alone: (seed, epoch, document, rows...)."""
    digest = hashlib.sha256(repr(of).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def without(values: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """`values` [n] that are not among the ascending `excluded` [m], in their order."""
    if not len(excluded):
        return values
    place = np.minimum(excluded.searchsorted(values), len(excluded) - 1)
    return values[excluded[place] != values]


def draw(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """`count` distinct members of `pool` [n], all of them when there are fewer."""
    return pool if len(pool) <= count else rng.choice(pool, count, replace=False)


def uniform(rng: np.random.Generator, bounds: tuple[int, int], excluded: np.ndarray, count: int) -> np.ndarray:
    """`count` distinct chunks in `bounds` outside the ascending `excluded` [m] (which lie within), or all there are.

    Rejection sampling, so that the cost is O(count + len(excluded)) whatever the bounds; where most draws would be
    rejected the pool is no larger than that, and is written down.
    """
    first, last = bounds
    if last - first <= 4 * (count + len(excluded)):
        return draw(rng, without(np.arange(first, last), excluded), count)
    drawn = excluded
    while len(drawn) < len(excluded) + count:
        drawn = np.concatenate([drawn, rng.integers(first, last, 2 * count)])
        order, new = ranked(drawn)
        once = np.zeros(len(drawn), bool)
        once[order[new]] = True
        drawn = drawn[once]  # the first time each was drawn; all of `excluded` stay in front
    return drawn[len(excluded) :][:count]


def as_tensor(rows: list[np.ndarray]) -> torch.Tensor:
    """Rows of different lengths -> [B, longest], zeros after the shorter ones; at least one column."""
    lengths = np.array([len(row) for row in rows])
    filled = np.arange(max(1, lengths.max())) < lengths[:, None]
    padded = np.zeros(filled.shape, rows[0].dtype)
    padded[filled] = np.concatenate(rows)
    return torch.from_numpy(padded)
