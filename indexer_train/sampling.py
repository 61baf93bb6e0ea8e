"""Sampled candidates: the golden chunks of each query token beside drawn negatives, at a cost that N does not enter."""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from data_gen.store import TraceDocument

COMMON = 0.8
"""A chunk that is golden for a larger share of a document's tokens says little about any one of them."""


@dataclass(frozen=True)
class SparseOracle:
    """The oracle of one document's T query tokens, never spread over its N chunks.

    pointers: [T + 1]; chunks: [M] int64, ascending within a token; mass, peak: [M] fp32, what WindowLabels pools;
    rest: [T] fp32, mass that was not stored; votes: mass is relative to all of a window's, not to its tokens.
    """

    pointers: np.ndarray
    chunks: np.ndarray
    mass: np.ndarray
    peak: np.ndarray
    rest: np.ndarray
    votes: bool

    @classmethod
    def of(cls, document: TraceDocument) -> Self:
        """The document's own oracle, layers averaged."""
        if document.trace.oracle == "indexer":
            golden = document.golden
            votes = golden.votes.float().numpy()
            rest = np.zeros(len(golden.pointers) - 1, np.float32)
            return cls(golden.pointers.numpy(), golden.chunks.long().numpy(), votes, votes, rest, votes=True)
        oracle = document.attention
        mass, peak = (value.float().mean(dim=1).numpy() for value in (oracle.mean, oracle.peak))
        return cls(oracle.pointers.numpy(), oracle.chunks.long().numpy(), mass, peak, oracle.rest.numpy(), votes=False)

    def window(self, first: int, last: int, bounds: tuple[int, int]) -> "WindowOracle":
        """What rows first..last-1 needed of the chunks in `bounds` (first and one past the last candidate)."""
        found = slice(self.pointers[first], self.pointers[last])
        chunks, where = np.unique(self.chunks[found], return_inverse=True)
        mass = np.bincount(where, self.mass[found], minlength=len(chunks)).astype(np.float64)  # of nothing: integers
        mass /= max(mass.sum(), 1.0) if self.votes else last - first
        peak = np.zeros(len(chunks), np.float32)
        np.maximum.at(peak, where, self.peak[found])
        inside = slice(*np.searchsorted(chunks, bounds))
        protected = 1 - mass[inside].sum() - self.rest[first:last].mean()
        return WindowOracle(bounds, chunks[inside], mass[inside].astype(np.float32), peak[inside], float(protected))

    def common(self, golden: float) -> np.ndarray:
        """Ascending chunks with a peak of at least `golden` at more than COMMON of the tokens."""
        chunks, tokens = np.unique(self.chunks[self.peak >= golden], return_counts=True)
        return chunks[tokens > COMMON * len(self.rest)]


@dataclass(frozen=True)
class WindowOracle:
    """What one lookahead window needed.

    bounds: first and one past the last candidate; chunks: [K] ascending candidates that the oracle names; mass, peak:
    [K]; protected: mass on protected chunks.
    """

    bounds: tuple[int, int]
    chunks: np.ndarray
    mass: np.ndarray
    peak: np.ndarray
    protected: float

    def golden(self, threshold: float) -> np.ndarray:
        """Ascending golden chunks."""
        return self.chunks[self.peak >= threshold]

    def at(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mass, peak) of any candidates; zero where the oracle names none."""
        if not len(self.chunks):
            return np.zeros(len(chunks), np.float32), np.zeros(len(chunks), np.float32)
        place = np.searchsorted(self.chunks, chunks).clip(max=len(self.chunks) - 1)
        named = self.chunks[place] == chunks
        return self.mass[place] * named, self.peak[place] * named


def generator(*of: int) -> np.random.Generator:
    """Random numbers that are a function of `of` alone: (seed, epoch, document, rows...)."""
    digest = hashlib.sha256(repr(of).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def without(values: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """`values` that are not among the ascending `excluded`, in their order."""
    if not len(excluded):
        return values
    place = np.searchsorted(excluded, values).clip(max=len(excluded) - 1)
    return values[excluded[place] != values]


def draw(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """`count` distinct members of `pool`, all of them when there are fewer."""
    return pool if len(pool) <= count else rng.choice(pool, count, replace=False)


def uniform(rng: np.random.Generator, bounds: tuple[int, int], excluded: np.ndarray, count: int) -> np.ndarray:
    """`count` distinct chunks in `bounds` outside the ascending `excluded` (which lie within), or all there are.

    Rejection sampling, so that the cost is O(count + len(excluded)) whatever the bounds; where most draws would be
    rejected the pool is no larger than that, and is written down.
    """
    first, last = bounds
    if last - first <= 4 * (count + len(excluded)):
        return draw(rng, without(np.arange(first, last), excluded), count)
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        more = without(rng.integers(first, last, 2 * count), excluded)
        drawn = np.concatenate([drawn, more])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]  # the first time each was drawn
    return drawn[:count]


def as_tensor(rows: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    """Rows of different lengths -> [B, longest], zeros behind the shorter ones; at least one column."""
    padded = torch.zeros(len(rows), max(1, *(len(row) for row in rows)), dtype=dtype)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = torch.from_numpy(row)
    return padded
