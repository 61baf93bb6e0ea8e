"""Who says which chunks mattered, and what a lookahead window needed of them: oracles, windows, labels.

`pooled_attention` and `native_picks` are the two oracles at work. `lookahead_windows` cuts a document's query tokens
into windows. `SparseOracle` pools the oracle over them: as it is stored, a few chunks a window (`WindowOracle`), or
spread out over all chunks (`WindowLabels`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import nn

from data_gen.core.chunks import Chunking
from data_gen.core.cpu import CACHE_ELEMENTS
from data_gen.core.tensors import TILE_ELEMENTS, distinct, ranges
from data_gen.traces.types import GoldenChunks, Span, SparseAttention

TOP_P = 0.6
"""Share of the softmax over a layer's top-k logits that its picks cover."""
COMMON = 0.8
"""A chunk that is golden for a larger share of a document's tokens says little about any one of them."""
DENSE_ELEMENTS = 1 << 25
"""Query tokens x chunks of which an oracle is kept spread out (288 MiB), where it names one in SPARSE of them."""
SPARSE = 64
SPREAD_WINDOWS = 256
"""Windows pooled at once where they are spread out: what is sorted then must not grow with the document."""


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    chunk_tokens: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probability per chunk, computed for a few queries at a time, never [S, T].

    query: [H, R, d] and key: [KV, T, d], both after RoPE; positions: [R], 0-based, a query sees keys 0..position.
    softcap: tanh cap of the logits (Gemma-2); sinks: [H] extra logits of the softmax (GPT-OSS);
    seen: [R, T] bool, the keys that sparse attention lets a query see, None for all.
    Returns [H, R, ceil(T / chunk_tokens)] fp32; the denominator holds every visible token, protected or not, so rows
    sum to one (less the share of `sinks`). The last entry may belong to an unfinished chunk.
    """
    heads, rows, _ = query.shape
    kv_heads, length, _ = key.shape
    query = query.float().unflatten(0, (kv_heads, -1)) * scaling  # [KV, groups, R, d]
    columns = key.float().transpose(1, 2)
    index = torch.arange(length, device=key.device)
    pooled = query.new_empty(heads, rows, -(-length // chunk_tokens))
    few = max(1, (CACHE_ELEMENTS if key.is_cpu else TILE_ELEMENTS) // (heads * length))
    for first in range(0, rows, few):
        tile = slice(first, first + few)
        logits = (query[:, :, tile].flatten(1, 2) @ columns).reshape(heads, -1, length)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        hidden = index > positions[tile, None]
        logits.masked_fill_(hidden if seen is None else hidden | ~seen[tile], -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().reshape(heads, 1, 1).expand(heads, logits.shape[1], 1)], dim=-1)
        probability = logits.softmax(dim=-1)[..., :length]
        missing = -length % chunk_tokens
        pooled[:, tile] = nn.functional.pad(probability, (0, missing)).unflatten(-1, (-1, chunk_tokens)).sum(dim=-1)
    return pooled


def native_picks(logits: torch.Tensor, visible: torch.Tensor, top_k: int) -> torch.Tensor:
    """One layer's picks by the release's rule. logits: [R, N] fp32; visible: [R] chunks. Returns [R, N] bool.

    Softmax over the top-k visible logits; in descending order, what stays within a cumulated TOP_P, always the first,
    then one more: the chunk that crosses (when the first alone exceeds TOP_P, the second counts as the crossing one).
    """
    chunks = logits.shape[1]
    hidden = torch.arange(chunks, device=logits.device) >= visible[:, None]
    best, order = logits.masked_fill(hidden, -torch.inf).topk(min(top_k, chunks), dim=1)
    within = best.softmax(dim=1).nan_to_num(0.0).cumsum(dim=1) <= TOP_P
    within[:, :1] = True
    taken = torch.cat([torch.ones_like(within[:, :1]), within[:, :-1]], dim=1)  # a prefix: the next one crosses
    return torch.zeros_like(hidden).scatter_(1, order, taken) & ~hidden


def lookahead_windows(
    spans: Iterable[Span], positions: torch.Tensor, chunking: Chunking, length: int, every: int, shortest: int
) -> torch.Tensor:
    """[W, 2] int64 rows (first, one past the last) of windows that have an unprotected chunk to choose.

    One of `length` query tokens starts every `every` rows from each span's `serve` on; one that the end of its span
    cuts short counts only where the span says so (`tail`) and `shortest` tokens remain. positions: [T] int64.
    """
    found, places = [np.empty((0, 2), np.int64)], positions.numpy()  # quicker than torch on so few numbers
    for span in spans:
        rows = np.arange(span.serve, max(span.serve, span.last), every)
        ends = np.minimum(rows + length, span.last)
        enough = ends - rows >= (min(shortest, length) if span.tail else length)
        found.append(np.stack([rows, ends], axis=1)[enough & (places[rows] >= chunking.first_choice)])
    return torch.from_numpy(np.concatenate(found))


def candidates(positions: torch.Tensor, chunking: Chunking, chunks: int) -> torch.Tensor:
    """[W, chunks] bool: unprotected chunks visible to resident sets fixed at `positions` ([W])."""
    index, last = torch.arange(chunks), (positions + 1) // chunking.tokens - chunking.recent
    return (index >= chunking.sink) & (index < last[:, None])


@dataclass(frozen=True)
class WindowLabels:
    """What each lookahead window needed, spread out for W windows and N chunks; zero where nothing was stored.

    mass: [W, N] fp32, attention probability averaged over heads, layers and the window's tokens; of the indexer oracle
    the share of all the window's votes that the chunk got, so that mass recall is the share of votes served;
    peak: [W, N] fp32, the window's maximum of the head-maximum probability averaged over layers; of the indexer oracle
    the most votes of any token; candidate: [W, N] bool, unprotected chunks visible at the start;
    rest: [W] fp32, mean mass that was not stored, zero of the indexer oracle.
    """

    mass: torch.Tensor
    peak: torch.Tensor
    candidate: torch.Tensor
    rest: torch.Tensor

    def golden(self, threshold: float) -> torch.Tensor:
        """[W, N] bool: candidates whose peak reaches `threshold` anywhere in the window."""
        return self.candidate & (self.peak >= threshold)


@dataclass(frozen=True)
class WindowOracle:
    """What one lookahead window needed, as far as something was stored: a row of `WindowLabels`.

    bounds: first and one past the last candidate; chunks: [K] int64, ascending candidates that the oracle names; mass,
    peak: [K] fp32; protected_mass: on protected chunks.
    """

    bounds: tuple[int, int]
    chunks: np.ndarray
    mass: np.ndarray
    peak: np.ndarray
    protected_mass: float

    def golden(self, threshold: float) -> np.ndarray:
        """Ascending golden chunks, [G] int64."""
        return self.chunks[self.peak >= threshold]

    def at(self, chunks: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mass, peak) of any candidates, fp32; zero where the oracle names none.

        table: [N] integers that are zero, for the moment of the call: looking up is faster than searching.
        """
        table[self.chunks] = np.arange(1, len(self.chunks) + 1)
        place = table[chunks]
        table[self.chunks] = 0
        return np.append(np.float32(0), self.mass)[place], np.append(np.float32(0), self.peak)[place]


@dataclass(frozen=True)
class SparseOracle:
    """The oracle of one document's T query tokens and `size` chunks, CSR over tokens, and its pooling over windows.

    pointers: [T + 1] int64; chunks: [M] int64, ascending within a token; mass, peak: [M] fp32, what `WindowLabels`
    pools, layers averaged; rest: [T] fp32, mass that was not stored; votes: mass is relative to all of a window's, not
    to its tokens.
    """

    pointers: np.ndarray
    chunks: np.ndarray
    mass: np.ndarray
    peak: np.ndarray
    rest: np.ndarray
    votes: bool
    size: int

    @classmethod
    def of(cls, oracle: SparseAttention | GoldenChunks, size: int) -> Self:
        """Of what a trace stores of a document of `size` complete chunks."""
        pointers, chunks = oracle.pointers.numpy(), oracle.chunks.long().numpy()
        if isinstance(oracle, GoldenChunks):
            votes = oracle.votes.float().numpy()
            return cls(pointers, chunks, votes, votes, np.zeros(len(pointers) - 1, np.float32), True, size)
        mass, peak = (value.float().mean(dim=1).numpy() for value in (oracle.mean, oracle.peak))
        return cls(pointers, chunks, mass, peak, oracle.rest.numpy(), False, size)

    def window(self, first: int, last: int, bounds: tuple[int, int]) -> WindowOracle:
        """What rows first..last-1 needed of the chunks in `bounds` (first and one past the last candidate)."""
        return self.windows(np.array([[first, last]]), [bounds])[0]

    def windows(self, rows: np.ndarray, bounds: list[tuple[int, int]]) -> list[WindowOracle]:
        """`window` of each of the windows [B, 2]."""
        found = []
        for (first, last), bound, (chunks, mass, peak) in zip(
            rows.tolist(), bounds, self._pooled(rows, False), strict=True
        ):
            inside = slice(*chunks.searchsorted(bound))
            protected = 1 - mass[inside].sum() - self.rest[first:last].mean()
            parts = chunks[inside], mass[inside].astype(np.float32), peak[inside]
            found.append(WindowOracle(bound, *parts, float(protected)))
        return found

    def labels(self, windows: torch.Tensor, positions: torch.Tensor, chunking: Chunking) -> WindowLabels:
        """All of `windows` ([W, 2] rows) spread out over the document's chunks. positions: [T] int64, of the rows."""
        candidate = candidates(positions[windows[:, 0]], chunking, self.size)
        mass, peak = torch.zeros(2, len(windows), self.size)
        masses, peaks = mass.numpy(), peak.numpy()
        for start in range(0, len(windows), SPREAD_WINDOWS):
            rows = windows[start : start + SPREAD_WINDOWS].numpy()
            for place, (chunks, *needed) in enumerate(self._pooled(rows, self._is_dense), start):
                masses[place, chunks], peaks[place, chunks] = needed
        rests = torch.from_numpy(np.append(0, self.rest.cumsum(dtype=np.float64)))
        first, last = windows.unbind(1)
        rest = ((rests[last] - rests[first]) / (last - first)).float()
        return WindowLabels(mass * candidate, peak * candidate, candidate, rest)

    def _pooled(self, rows: np.ndarray, dense: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each of the windows [B, 2]: ascending chunks with something stored, their mass (fp64) and highest peak.

        dense: add up rows of all chunks, which takes no sorting but keeps the oracle spread out; else what is stored is
        sorted, and N does not enter. Either way a chunk's mass is added up token by token in fp64: the same to the last
        bit.
        """

        def share(mass: np.ndarray, tokens: int) -> np.ndarray:
            return mass / (max(mass.sum(), 1.0) if self.votes else tokens)

        if dense:
            mass, peak, stored = self._dense
            for first, last in rows.tolist():
                chunks = np.flatnonzero(stored[first:last].any(axis=0))
                total = mass[first:last].sum(axis=0, dtype=np.float64)
                yield chunks, share(total[chunks], last - first), peak[first:last].max(axis=0)[chunks]
            return
        begin, end = self.pointers[rows].T
        owner, places = np.repeat(np.arange(len(rows)), end - begin), ranges(begin, end)
        named, where = distinct(owner * self.size + self.chunks[places])
        mass = np.bincount(where, self.mass[places], minlength=len(named)).astype(np.float64)  # of nothing: integers
        peak = np.zeros(len(named), np.float32)
        np.maximum.at(peak, where, self.peak[places])
        cuts = named.searchsorted(np.arange(len(rows) + 1) * self.size).tolist()
        for number, ((first, last), (start, stop)) in enumerate(zip(rows.tolist(), pairwise(cuts), strict=True)):
            yield named[start:stop] - number * self.size, share(mass[start:stop], last - first), peak[start:stop]

    @property
    def _is_dense(self) -> bool:
        everything = len(self.rest) * self.size
        return everything <= DENSE_ELEMENTS and len(self.chunks) * SPARSE >= everything

    @cached_property
    def _dense(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(mass, peak, whether something is stored), each [T, size]; zero where nothing is."""
        index = np.repeat(np.arange(len(self.rest)), np.diff(self.pointers)), self.chunks
        mass, peak = np.zeros((2, len(self.rest), self.size), np.float32)
        stored = np.zeros(mass.shape, bool)
        mass[index], peak[index], stored[index] = self.mass, self.peak, True
        return mass, peak, stored

    def common(self, golden: float) -> np.ndarray:
        """Ascending chunks [n] with a peak of at least `golden` at more than COMMON of the tokens."""
        chunks, tokens = np.unique(self.chunks[self.peak >= golden], return_counts=True)
        return chunks[tokens > COMMON * len(self.rest)]
