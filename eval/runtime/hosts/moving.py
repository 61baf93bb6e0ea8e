"""How a host's cache gets another resident set, in two steps: what is missing is fetched, then the set is in force.

Tokens may be read between the two (lag 1): they see the old set, while the missing chunks come into memory of their
own. In force there is one set only, and one table that says what lies where.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_gen.core.errors import InputError
from eval.runtime.hosts.cold import ColdEntries
from eval.runtime.hosts.resident import PAD, Move, ResidentTable
from eval.serving.pools import ColdPool
from eval.serving.residency import Ticket


@dataclass(frozen=True)
class Prepared:
    """A resident set whose missing chunks are on their way.

    resident: one [R] of ascending ids a sequence; total: chunks made when it was planned; move: what was to move then;
    before: the table's rows that it was planned on; fetched: the missing chunks, [n, *unit], None where none is; pools:
    where they come from, which must outlive the copy.
    """

    resident: Sequence[torch.Tensor]
    total: int
    move: Move
    before: torch.Tensor
    fetched: Ticket | None
    pools: list[ColdPool]


class MovingChunks(ABC):
    """What the caches of all hosts have in common, to stand before DynamicCache among a cache's bases.

    table: what lies in which row; cold: all chunks; pageable: as ColdPool's.
    """

    table: ResidentTable
    cold: ColdEntries
    pageable: bool | None
    total: int
    """Complete chunks of each sequence."""
    batch: int
    """Sequences read, 0 before any."""
    device: torch.device
    """Where fetched chunks land."""

    @abstractmethod
    def stage(self) -> None:
        """Copy the chunks completed since the last time to the cold side."""

    @abstractmethod
    def _rewrite(self, move: Move, fetched: torch.Tensor | None) -> None:
        """Lay out the rows of all layers as `move` says; the table still says how they lie."""

    def resident(self) -> list[torch.Tensor]:
        """The resident chunks of each sequence, ascending."""
        return [row[row != PAD] for row in self.table.chunks(self.total, self.batch)]

    def prepare(self, resident: Sequence[torch.Tensor], beside: bool = True) -> Prepared:
        """Plan a set, one [R] of ascending ids a sequence, and fetch what is missing; the old one stays in force.

        beside: the fetch goes on while tokens are read; without, what is read next comes after it. A fork may keep what
        was prepared before it. Raises InputError for another number of sequences, and for ids that are not ascending
        complete chunks.
        """
        if len(resident) != self.batch:
            raise InputError(f"{len(resident)} resident sets, but the cache holds {self.batch} sequences: one for each")
        self.stage()
        move = self.table.plan(resident, self.total)
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
            move = self.table.plan([torch.cat([chunks.cpu(), made]) for chunks in prepared.resident], self.total)
        rows = self.table.kept.shape[1] + self.total - self.table.fresh
        if move.fetched or move.evicted or move.shape[1] != rows:  # otherwise the same chunks in the same rows
            self._rewrite(move, None if prepared.fetched is None else prepared.fetched.result())
        self.table.fix(move, self.total)
        return move

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.table.reorder(beam_idx)
        self.cold.reorder(beam_idx.tolist())

    def reset(self) -> None:
        super().reset()
        lane = self.cold.lane
        self._forget()
        self.cold.lane = lane  # a new stream for every conversation would keep memory of its own

    def _forget(self) -> None:
        self.table, self.cold = ResidentTable(), ColdEntries(self.pageable)
