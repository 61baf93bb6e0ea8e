"""Sampled candidates: the golden chunks of each query token beside drawn negatives, at a cost that N does not enter."""

import hashlib
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from datasets import Dataset

from data_gen.traces.store import TraceDocument, TraceStore

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
        return self.windows(np.array([[first, last]]), [bounds])[0]

    def windows(self, rows: np.ndarray, bounds: list[tuple[int, int]]) -> list["WindowOracle"]:
        """`window` of each of the windows [B, 2], all of them pooled at once."""
        begin, end = self.pointers[rows].T
        places = spans(begin, end)
        owner = np.repeat(np.arange(len(rows)), end - begin)
        width = 1 + int(self.chunks[places].max(initial=0))
        named, where = distinct(owner * width + self.chunks[places])
        mass = np.bincount(where, self.mass[places], minlength=len(named)).astype(np.float64)  # of nothing: integers
        peak = np.zeros(len(named), np.float32)
        np.maximum.at(peak, where, self.peak[places])
        starts = np.arange(len(rows) + 1) * width
        limits = named.searchsorted(starts[:-1, None] + np.minimum(bounds, width))
        cuts = named.searchsorted(starts).tolist()
        found = []
        for number, (first, last) in enumerate(rows.tolist()):
            own, inside = mass[cuts[number] : cuts[number + 1]], slice(*limits[number])
            own /= max(own.sum(), 1.0) if self.votes else last - first
            protected = 1 - mass[inside].sum() - self.rest[first:last].mean()
            parts = named[inside] - starts[number], mass[inside].astype(np.float32), peak[inside]
            found.append(WindowOracle(bounds[number], *parts, float(protected)))
        return found

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

    def at(self, chunks: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mass, peak) of any candidates; zero where the oracle names none.

        table: [N] integers that are zero, for the moment of the call: looking up is faster than searching.
        """
        table[self.chunks] = np.arange(1, len(self.chunks) + 1)
        place = table[chunks]
        table[self.chunks] = 0
        return np.append(np.float32(0), self.mass)[place], np.append(np.float32(0), self.peak)[place]


def any_golden(store: TraceStore, index: Dataset, threshold: float) -> bool:
    """Whether any window of `index` (`window_index`) has a golden chunk; looks no further than the first."""
    rows = torch.tensor([index[name][:] for name in ("document", "first", "last")]).T
    for number, document in enumerate(store):
        oracle = SparseOracle.of(document)
        for first, last in rows[rows[:, 0] == number, 1:].tolist():
            bounds = document.trace.chunking.candidates(int(document.positions[first]))
            if len(oracle.window(first, last, bounds).golden(threshold)):
                return True
    return False


def generator(*of: int) -> np.random.Generator:
    """Random numbers that are a function of `of` alone: (seed, epoch, document, rows...)."""
    digest = hashlib.sha256(repr(of).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


def spans(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
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


def without(values: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """`values` that are not among the ascending `excluded`, in their order."""
    if not len(excluded):
        return values
    place = np.minimum(excluded.searchsorted(values), len(excluded) - 1)
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
    drawn = excluded
    while len(drawn) < len(excluded) + count:
        drawn = np.concatenate([drawn, rng.integers(first, last, 2 * count)])
        order, new = ranked(drawn)
        once = np.zeros(len(drawn), bool)
        once[order[new]] = True
        drawn = drawn[once]  # the first time each was drawn; all of `excluded` stay in front
    return drawn[len(excluded) :][:count]


def as_tensor(rows: list[np.ndarray]) -> torch.Tensor:
    """Rows of different lengths -> [B, longest], zeros behind the shorter ones; at least one column."""
    lengths = np.array([len(row) for row in rows])
    filled = np.arange(max(1, lengths.max())) < lengths[:, None]
    padded = np.zeros(filled.shape, rows[0].dtype)
    padded[filled] = np.concatenate(rows)
    return torch.from_numpy(padded)
