"""Who says which chunks mattered, and what a lookahead window needed of them: oracles, windows, labels.

`pooled_attention` and `native_picks` are the two oracles at work. `lookahead_windows` cuts a document's query tokens
into windows. `SparseOracle` pools the oracle over them: as it is stored, a few chunks a window (`WindowOracle`), or
spread out over all chunks (`WindowLabels`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch

from data_gen.core.chunks import Chunking
from data_gen.core.tensors import TILE_ELEMENTS, distinct, ranges
from data_gen.traces.types import GoldenChunks, Span, SparseAttention

TOP_P = 0.6
"""Share of the softmax over a layer's top-k logits that its picks cover."""
COMMON = 0.8
"""A chunk that is golden for a larger share of a document's tokens says little about any one of them."""
DENSE_ELEMENTS = 1 << 25
"""Query tokens x chunks of which an oracle is kept spread out (256 MiB); beyond, a few windows at a time are."""
SPREAD_WINDOWS = 256
"""Windows pooled at once where votes are spread out: what is sorted then must not grow with the document."""


def pooled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    chunk_tokens: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention probability per chunk, computed in key tiles, never [S, T].

    query: [H, R, d] and key: [KV, T, d], both after RoPE; positions: [R], 0-based, a query sees keys 0..position.
    softcap: tanh cap of the logits (Gemma-2); sinks: [H] extra logits of the softmax (GPT-OSS).
    Returns [H, R, ceil(T / chunk_tokens)] fp32; the denominator holds every visible token, protected or not, so rows
    sum to one (less the share of `sinks`). The last entry may belong to an unfinished chunk.
    """
    heads, rows, _ = query.shape
    kv_heads, length, _ = key.shape
    chunks = -(-length // chunk_tokens)
    query = query.float().reshape(kv_heads, -1, query.shape[-1])  # [KV, groups * R, d]
    log_mass = query.new_empty(heads, rows, chunks)
    step = max(1, TILE_ELEMENTS // (heads * rows * chunk_tokens))
    for first in range(0, chunks, step):
        last = min(chunks, first + step)
        tile = key[:, first * chunk_tokens : last * chunk_tokens].float()
        logits = (query @ tile.transpose(1, 2) * scaling).reshape(heads, rows, -1)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        index = torch.arange(first * chunk_tokens, first * chunk_tokens + tile.shape[1], device=key.device)
        logits = logits.masked_fill(index > positions[:, None], -torch.inf)
        missing = (last - first) * chunk_tokens - tile.shape[1]
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        log_mass[..., first:last] = logits.unflatten(-1, (-1, chunk_tokens)).logsumexp(dim=-1)
    total = log_mass
    if sinks is not None:
        total = torch.cat([log_mass, sinks.float().reshape(heads, 1, 1).expand(heads, rows, 1)], dim=-1)
    return (log_mass - total.logsumexp(dim=-1, keepdim=True)).exp()


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
    found = []
    for span in spans:
        for row in range(span.serve, span.last, every):
            end = min(row + length, span.last)
            long_enough = end - row == length or (span.tail and end - row >= shortest)
            first, last = chunking.candidates(int(positions[row]))
            if long_enough and last > first:
                found.append((row, end))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


def candidates(positions: torch.Tensor, chunking: Chunking, chunks: int) -> torch.Tensor:
    """[W, chunks] bool: unprotected chunks visible to resident sets fixed at `positions` ([W])."""
    bounds = torch.tensor([chunking.candidates(int(p)) for p in positions]).reshape(-1, 2)
    index = torch.arange(chunks)
    return (index >= bounds[:, :1]) & (index < bounds[:, 1:])


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
    peak: [K] fp32; protected: mass on protected chunks.
    """

    bounds: tuple[int, int]
    chunks: np.ndarray
    mass: np.ndarray
    peak: np.ndarray
    protected: float

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
        """`window` of each of the windows [B, 2], all of them pooled at once."""
        owner, places = self._stored(rows)
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

    def labels(self, windows: torch.Tensor, positions: torch.Tensor, chunking: Chunking) -> WindowLabels:
        """All of `windows` ([W, 2] rows) spread out over the document's chunks. positions: [T] int64, of the rows."""
        candidate = candidates(positions[windows[:, 0]], chunking, self.size)
        if self.votes:
            return self._spread(windows, candidate)
        if len(self.rest) * self.size <= DENSE_ELEMENTS:
            return self._running(windows, candidate, self._dense, 0)
        stride = int(windows[1, 0] - windows[0, 0]) if len(windows) > 1 else 1
        longest = int(windows.diff(dim=1).max())
        rows = DENSE_ELEMENTS // 2 // self.size - longest
        few = max(1, rows // stride + 1)
        parts = []
        for some, seen in zip(windows.split(few), candidate.split(few), strict=True):
            first, last = int(some.min()), int(some.max())
            parts.append(vars(self._running(some, seen, self.dense(first, last), first)).values())
        return WindowLabels(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _stored(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(window, place in `chunks`) of everything stored of the tokens of windows [B, 2], window by window."""
        begin, end = self.pointers[rows].T
        return np.repeat(np.arange(len(rows)), end - begin), ranges(begin, end)

    def _spread(self, windows: torch.Tensor, candidate: torch.Tensor) -> WindowLabels:
        """Labels made of votes: whole numbers, whose sums are exact in any order. Cost: what is stored, and W x N."""
        mass, peak = torch.zeros(2, len(windows), self.size)
        for start in range(0, len(windows), SPREAD_WINDOWS):
            some = slice(start, start + SPREAD_WINDOWS)
            owner, places = self._stored(windows[some].numpy())
            index = torch.from_numpy(owner * self.size + self.chunks[places])
            votes = torch.from_numpy(self.mass[places])
            mass[some].view(-1).index_add_(0, index, votes)
            peak[some].view(-1).scatter_reduce_(0, index, votes, "amax")
        mass /= mass.sum(dim=1, keepdim=True).clamp_min(1)
        return WindowLabels(mass * candidate, peak * candidate, candidate, torch.zeros(len(windows)))

    def _running(
        self, windows: torch.Tensor, candidate: torch.Tensor, dense: tuple[torch.Tensor, torch.Tensor], origin: int
    ) -> WindowLabels:
        """Labels by running sums over `dense`, whose first row is row `origin` of the document.

        `windows` adds up each window's own terms, this subtracts two running totals, which takes no sorting where most
        chunks are stored. Both are float64 cut to float32 at the end: no value of four million compared came out
        different, but nothing promises it, so neither stands in for the other where bits must stay what they were.
        """
        mean, peak = dense
        rest = torch.from_numpy(self.rest)[origin : origin + len(mean)]
        totals = torch.cat([mean.new_zeros(1, self.size), mean]).double().cumsum(0)
        rests = torch.cat([rest.new_zeros(1), rest]).double().cumsum(0)
        first, last = (windows - origin).unbind(1)
        length = (last - first).double()
        mass = ((totals[last] - totals[first]) / length[:, None]).clamp_min(0).float()
        highest = torch.stack([peak[a:b].amax(dim=0) for a, b in zip(first.tolist(), last.tolist(), strict=True)])
        return WindowLabels(
            mass=mass * candidate,
            peak=highest * candidate,
            candidate=candidate,
            rest=((rests[last] - rests[first]) / length).float(),
        )

    @cached_property
    def _dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dense()

    def dense(self, first: int = 0, last: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(mass, peak) of rows first..last-1, each [rows, size] fp32; zero where nothing was stored."""
        pointers = torch.from_numpy(self.pointers[first : None if last is None else last + 1])
        rows = torch.repeat_interleave(pointers.diff())
        stored = slice(int(pointers[0]), int(pointers[-1]))
        index = rows, torch.from_numpy(self.chunks[stored])
        mass, peak = torch.zeros(2, len(pointers) - 1, self.size)
        mass[index], peak[index] = torch.from_numpy(self.mass[stored]), torch.from_numpy(self.peak[stored])
        return mass, peak

    def common(self, golden: float) -> np.ndarray:
        """Ascending chunks with a peak of at least `golden` at more than COMMON of the tokens."""
        chunks, tokens = np.unique(self.chunks[self.peak >= golden], return_counts=True)
        return chunks[tokens > COMMON * len(self.rest)]
