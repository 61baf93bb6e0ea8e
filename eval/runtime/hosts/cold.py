"""The cold side of a host: all chunks of a batch of sequences, in host memory."""

import copy
from concurrent.futures import Future

import numpy as np
import torch

from eval.serving.fetch import best_move
from eval.serving.pools import ColdPool, HotPool
from eval.serving.residency import Lane, Ticket, side_lane


class ColdEntries:
    """A pool a sequence; a unit is one chunk in all layers, of any shape: one copy brings all of it.

    Forks and reordered sequences share pools until one of them gets new chunks, and full segments of pools for good.
    pageable: as ColdPool's; lane: of fetches beside reading, made when first asked for.
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

    def fetch(
        self, sequences: torch.Tensor, chunks: torch.Tensor, device: torch.device, beside: bool = False
    ) -> Ticket:
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

    def fork(self) -> "ColdEntries":
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
    """Units of several pools, one behind the other, in new memory of the device: [n, *shape]."""
    parts = []
    for pool, units in asked:
        landing = HotPool(len(units), pool.layout.shape, pool.layout.dtype, device)
        best_move(pool, landing)(pool, units, landing, np.arange(len(units), dtype=np.int32))
        parts.append(landing.slots)
    return torch.cat(parts)


def _segments(pool: ColdPool) -> list[torch.Tensor]:
    """The pool's units, [n, *shape] a segment: the memory itself."""
    return [
        pool.layout.view(segment)[: max(0, pool.units - start)]
        for segment, start in zip(pool.segments, pool.starts, strict=True)
    ]
