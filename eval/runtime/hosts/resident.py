"""How a host's cache gets another resident set: the one mechanism of all hosts.

`ResidentTable` says which chunk lies in which row of the cache and what must move (`Move`); `ColdChunks` holds all
chunks in host memory and brings them back; `ResidentChunks`, a base of every host's cache, joins the two in two steps:
what is missing is fetched (`prepare`), then the set is in force (`keep`). Tokens may be read between the two (lag 1):
they see the old set, while the missing chunks come into memory of their own. In force there is one set only, and one
table that says what lies where.

Stock attention reads contiguous tensors, so resident rows stay compact and in the order of chunks, for all sequences of
a batch at once: a new set rewrites them. An engine with paged kernels takes `eval.serving.residency` instead, whose
table (one sequence, slots in any order, owned before they can be read) has nothing in common but the purpose.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from transformers import DynamicCache

from data_gen.core.errors import InputError
from eval.serving.pools import ColdPool, HotPool, Lane, Ticket, best_copy, side_lane

PAD = -1
"""Stands for no chunk, in front of the chunks of a sequence that has fewer resident ones than its neighbours."""


@dataclass(frozen=True)
class Move:
    """How one resident set becomes another; index pairs (sequence, row or chunk).

    kept: the new set, [B, R] as the table keeps it; stay: rows of the old set, stay_to: where they go; fetch: chunks of
    the cold side, fetch_to: where they go; evicted: chunks that leave.
    """

    kept: torch.Tensor
    stay: tuple[torch.Tensor, torch.Tensor]
    stay_to: tuple[torch.Tensor, torch.Tensor]
    fetch: tuple[torch.Tensor, torch.Tensor]
    fetch_to: tuple[torch.Tensor, torch.Tensor]
    evicted: int

    @property
    def shape(self) -> tuple[int, int]:
        """(B, R) of the new rows."""
        return self.kept.shape[0], self.kept.shape[1]

    @property
    def fetched(self) -> int:
        """Chunks that come from the cold side."""
        return len(self.fetch[0])


class ResidentTable:
    """Which chunk lies in which row of the cache: the kept ones, then all that were made since.

    kept: [B, R] int64, ascending in each sequence, PAD first; fresh: the first chunk made since `kept` was fixed. At
    first everything is resident, for any number of sequences.
    """

    def __init__(self) -> None:
        self.kept, self.fresh = torch.empty(1, 0, dtype=torch.int64), 0

    def rows(self, total: int) -> int:
        """Rows of a sequence when `total` chunks were made."""
        return self.kept.shape[1] + total - self.fresh

    def chunks(self, total: int, batch: int) -> torch.Tensor:
        """The chunk in every row, [B, rows], of `total` made so far."""
        fresh = torch.arange(self.fresh, total)
        return torch.cat([self.kept.expand(batch, -1), fresh.expand(batch, -1)], dim=1)

    def evicted(self) -> bool:
        """Whether some row is not the chunk of its own number."""
        return self.kept.shape[1] != self.fresh or self.padded()

    def padded(self) -> bool:
        """Whether sequences keep different numbers of chunks."""
        return bool((self.kept == PAD).any())

    def reorder(self, sequences: torch.Tensor) -> None:
        """Sequence i becomes what sequences[i] was; a new tensor, so that what was planned before is known as stale."""
        self.kept = self.kept[sequences.cpu()] if len(self.kept) > 1 else self.kept.clone()

    def move_to(self, resident: Sequence[torch.Tensor], total: int) -> Move:
        """What must move to make these the resident chunks of each sequence, [R] ascending ids below `total`.

        Raises InputError for ids that are none.
        """
        old = self.chunks(total, len(resident))
        for sequence, chunks in enumerate(resident):
            inside = not len(chunks) or (int(chunks[0]) >= 0 and int(chunks[-1]) < total)
            if not inside or bool((chunks.diff() <= 0).any()):
                raise InputError(
                    f"resident chunks of sequence {sequence}: must be ascending, without repeats, below {total}"
                )
        longest = max(map(len, resident))
        new = torch.stack([torch.nn.functional.pad(c.long().cpu(), (longest - len(c), 0), value=PAD) for c in resident])
        # Both sides ascend (PAD, the smallest, comes first), so the row of a chunk that lies here is a binary search.
        row = torch.searchsorted(old, new).clamp_max(max(old.shape[1] - 1, 0))
        held = (old.gather(1, row) == new) & (new != PAD) if old.shape[1] else torch.zeros_like(new, dtype=torch.bool)
        stay_to, fetch_to = _pairs(held), _pairs(~held & (new != PAD))
        return Move(
            kept=new,
            stay=(stay_to[0], row[stay_to]),
            stay_to=stay_to,
            fetch=(fetch_to[0], new[fetch_to]),
            fetch_to=fetch_to,
            evicted=int((old != PAD).sum()) - len(stay_to[0]),
        )

    def fix(self, move: Move, total: int) -> None:
        """The rows now lie as `move`, planned for `total` chunks, says."""
        self.kept, self.fresh = move.kept, total


def _pairs(marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequences, columns) of the marks, row after row. marks: [B, R] bool."""
    sequences, columns = marks.nonzero(as_tuple=True)
    return sequences, columns


class ColdChunks:
    """All chunks of a batch of sequences in host memory: one pool per sequence, a unit is one chunk in all layers.

    One copy brings all of a chunk. Forks and reordered sequences share pools until one of them gets new chunks, and
    full segments of pools for good. pageable: as ColdPool's; lane: of fetches beside reading, made when first asked
    for.
    """

    def __init__(self, pageable: bool | None = None) -> None:
        self._pageable = pageable
        self.pools: list[ColdPool] = []
        self._shared: list[bool] = []
        self.lane: Lane | None = None

    @property
    def count(self) -> int:
        """Chunks of each sequence."""
        return self.pools[0].units if self.pools else 0

    @property
    def unit_bytes(self) -> int:
        """Bytes of a chunk in all layers, 0 before any."""
        return self.pools[0].layout.elements * self.pools[0].layout.dtype.itemsize if self.pools else 0

    def append(self, units: torch.Tensor) -> None:
        """units: [B, n, *shape], copied. Raises InputError when the machine cannot pin that much memory."""
        if not self.pools:
            self.pools = [ColdPool(tuple(units.shape[2:]), units.dtype, self._pageable) for _ in units]
            self._shared = [False] * len(units)
        for sequence, new in enumerate(units):
            if self._shared[sequence]:
                self.pools[sequence] = self.pools[sequence].fork()
                self._shared[sequence] = False
            self.pools[sequence].append(new)

    def fetch(self, sequences: torch.Tensor, chunks: torch.Tensor, device: torch.device, beside: bool) -> Ticket:
        """Units of (sequence, chunk) pairs, sequences ascending: [n] each -> [n, *shape] on `device`, as `result`.

        beside: in a lane of its own, while decoding goes on (from pageable memory to a GPU it waits all the same).
        """
        asked = [
            (pool, units)
            for sequence, pool in enumerate(self.pools)
            if len(units := chunks[sequences == sequence].numpy().astype(np.int32))
        ]
        if beside:
            self.lane = self.lane or side_lane(device)
            return self.lane.submit(_land, asked, device)
        ticket: Future[torch.Tensor] = Future()
        ticket.set_result(_land(asked, device))
        return ticket

    def units(self, sequence: int) -> torch.Tensor:
        """All chunks of a sequence, [N, *shape] on the CPU."""
        pool = self.pools[sequence]
        if pool.pinned:
            torch.cuda.current_stream().synchronize()  # copies into pinned memory may be under way
        return torch.cat([torch.empty(0, *pool.layout.shape, dtype=pool.layout.dtype), *_segments(pool)])

    def fork(self) -> "ColdChunks":
        """An independent continuation of the same history."""
        self._shared = [True] * len(self.pools)
        twin = copy.copy(self)
        twin.pools, twin._shared = list(self.pools), list(self._shared)
        return twin

    def reorder(self, sequences: list[int]) -> None:
        """Sequence i becomes what sequences[i] was."""
        if self.pools:
            self.pools = [self.pools[sequence] for sequence in sequences]
            self._shared = [True] * len(sequences)


def _land(asked: list[tuple[ColdPool, np.ndarray]], device: torch.device) -> torch.Tensor:
    """Units of several pools, one after the other, in new memory of the device: [n, *shape]."""
    parts = []
    for pool, units in asked:
        landing = HotPool(len(units), pool.layout.shape, pool.layout.dtype, device)
        best_copy(pool, landing)(pool, units, landing, np.arange(len(units), dtype=np.int32))
        parts.append(landing.slots)
    return torch.cat(parts)


def _segments(pool: ColdPool) -> list[torch.Tensor]:
    """The pool's units, [n, *shape] a segment: the memory itself."""
    return [
        pool.layout.view(segment)[: max(0, pool.units - start)]
        for segment, start in zip(pool.segments, pool.starts, strict=True)
    ]


@dataclass(frozen=True)
class Prepared:
    """A resident set whose missing chunks are on their way.

    resident: one [R] of ascending ids per sequence; total: chunks made when it was planned; move: what was to move;
    before: the table's rows that it was planned on; fetched: the missing chunks, [n, *unit], None where none is; pools:
    where they come from, which must outlive the copy.
    """

    resident: Sequence[torch.Tensor]
    total: int
    move: Move
    before: torch.Tensor
    fetched: Ticket | None
    pools: list[ColdPool]


class ResidentChunks(DynamicCache, ABC):
    """What the caches of all hosts have in common: a stock cache that shows the model the resident chunks only.

    table: what lies in which row; cold: all chunks; newest: what the newest token of each sequence brought into the
    layers that the memory indexer reads, layer -> [B, hidden] bf16. New chunks are resident until the next `keep`;
    then they go cold, if they are not kept. pageable: as ColdPool's.
    """

    table: ResidentTable
    cold: ColdChunks
    newest: dict[int, torch.Tensor]
    pageable: bool | None

    @property
    @abstractmethod
    def total(self) -> int:
        """Complete chunks of each sequence."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Sequences read, 0 before any."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where fetched chunks land."""

    @abstractmethod
    def stage(self) -> None:
        """Copy the chunks completed since the last time to the cold side."""

    @abstractmethod
    def _rewrite(self, move: Move, fetched: torch.Tensor | None) -> None:
        """Lay out the rows of all layers as `move` says; the table still says how they lie. fetched: [n, *unit]."""

    @abstractmethod
    def resident_bytes(self) -> int:
        """Bytes of what is resident in the layers that evict, as it is stored."""

    def resident(self) -> list[torch.Tensor]:
        """The resident chunks of each sequence, ascending."""
        return [row[row != PAD] for row in self.table.chunks(self.total, self.batch)]

    def prepare(self, resident: Sequence[torch.Tensor], beside: bool = True) -> Prepared:
        """Plan a set, one [R] of ascending ids per sequence, and fetch what is missing; the old one stays in force.

        beside: the fetch goes on while tokens are read; without, what is read next comes after it. A fork may keep what
        was prepared before it. Raises InputError for another number of sequences, and for ids that are not ascending
        complete chunks.
        """
        if len(resident) != self.batch:
            raise InputError(f"{len(resident)} resident sets, but the cache holds {self.batch} sequences: one for each")
        self.stage()
        move = self.table.move_to(resident, self.total)
        fetched = self.cold.fetch(*move.fetch, self.device, beside) if move.fetched else None
        return Prepared(resident, self.total, move, self.table.kept, fetched, list(self.cold.pools))

    def keep(self, resident: Sequence[torch.Tensor] | Prepared) -> Move:
        """Make exactly these complete chunks resident, and those made since they were prepared; later ones join too.

        Raises InputError as `prepare`; ValueError for a set that was prepared before another one came into force, or
        before sequences were reordered or forgotten.
        """
        prepared = resident if isinstance(resident, Prepared) else self.prepare(resident, beside=False)
        if prepared.before is not self.table.kept:
            raise ValueError("the set was prepared for rows that are no longer there: prepare it again")
        self.stage()
        move = prepared.move
        if self.total > prepared.total:  # what was made since lies here already: the same chunks are missing
            made = torch.arange(prepared.total, self.total)
            move = self.table.move_to([torch.cat([chunks.cpu(), made]) for chunks in prepared.resident], self.total)
        if move.fetched or move.evicted or move.shape[1] != self.table.rows(self.total):  # else the same rows
            self._rewrite(move, None if prepared.fetched is None else prepared.fetched.result())
        self.table.fix(move, self.total)
        return move

    def fork(self) -> Self:
        """An independent continuation of the same history; tensors are shared until either side continues."""
        self.stage()
        twin = copy.copy(self)
        twin.table, twin.cold, twin.newest = copy.copy(self.table), self.cold.fork(), dict(self.newest)
        return twin

    def crop(self, *args: object, **kwargs: object) -> None:
        """Refused: cold chunks cannot be taken back."""
        raise NotImplementedError("cold chunks cannot be taken back: no assisted or speculative decoding")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.table.reorder(beam_idx)
        self.cold.reorder(beam_idx.tolist())
        self.newest = {layer: state[beam_idx.to(state.device)] for layer, state in self.newest.items()}

    def reset(self) -> None:
        super().reset()
        lane = self.cold.lane
        self._forget()
        self.cold.lane = lane  # a new stream for every conversation would keep memory of its own

    def _forget(self) -> None:
        self.table, self.cold, self.newest = ResidentTable(), ColdChunks(self.pageable), {}
