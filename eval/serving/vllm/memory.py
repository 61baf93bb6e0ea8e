"""Cold blocks leave the engine's pool for host memory and come back: what is in the pool is what is visible.

Two messages travel with the engine's own: Moves (worker to scheduler: blocks to free, blocks wanted back) and loads
(scheduler to worker: which block each of those was given). A chunk that is on its way is not visible yet.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch


@dataclass
class Moves:
    """Of one sequence, by chunk. evict: copied to the host, their blocks may be freed; fetch: wanted back."""

    evict: list[int] = field(default_factory=list)
    fetch: list[int] = field(default_factory=list)


@dataclass
class Residence:
    """Where one sequence's complete chunks are.

    host: chunk -> its keys and values of all layers; absent: chunks that are nowhere in the pool; moved: chunks that
    came back -> their block, instead of the one in the engine's table; keys: [N, L, width] fp16 of all chunks, because
    those of a freed block are overwritten.
    """

    host: dict[int, torch.Tensor] = field(default_factory=dict)
    absent: set[int] = field(default_factory=set)
    moved: dict[int, int] = field(default_factory=dict)
    keys: torch.Tensor | None = None

    def add_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Append those of chunks completed since the last time, [n, L, width]; returns all."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        return self.keys

    def visible(self, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first `chunks` chunks those in the pool, [n] int64 ascending, and of each the block that it has moved
        to, [n] int32, -1 for the engine's own."""
        kept = [chunk for chunk in range(chunks) if chunk not in self.absent]
        blocks = [self.moved.get(chunk, -1) for chunk in kept]
        return torch.tensor(kept, dtype=torch.int64), torch.tensor(blocks, dtype=torch.int32)


class Memory:
    """Host memory for the cold chunks of all sequences of one engine process.

    caches: keys and values of each layer, [blocks, ...]; limit: most bytes on the host. When it is full, chunks stay in
    the pool and visible; `full` tells.
    """

    def __init__(self, caches: Many[torch.Tensor], limit: int) -> None:
        self.caches, self.limit = list(caches), limit
        self.chunk_bytes = sum(cache[0].nbytes for cache in self.caches)
        self.residences: dict[str, Residence] = {}
        self.moves: dict[str, Moves] = {}
        self.fetched = self.evicted = 0
        self.full = False

    @property
    def used(self) -> int:
        """Bytes on the host."""
        return self.chunk_bytes * sum(len(residence.host) for residence in self.residences.values())

    def of(self, name: str) -> Residence:
        """The sequence's residence, an empty one the first time."""
        return self.residences.setdefault(name, Residence())

    def forget(self, name: str) -> None:
        """A sequence is gone, or is about to be read again into other blocks."""
        self.residences.pop(name, None)
        self.moves.pop(name, None)

    def settle(self, name: str, wanted: set[int], chunks: int, table: torch.Tensor) -> None:
        """Towards a new set: of the first `chunks` chunks, what is not wanted leaves, what is missing is asked for.

        table: [blocks], the sequence's block of each chunk.
        """
        residence, moves = self.of(name), Moves()
        for chunk in range(chunks):
            if chunk in residence.absent or chunk in wanted:
                continue
            if chunk not in residence.host and not self._save(residence, chunk, table):
                continue
            residence.absent.add(chunk)
            residence.moved.pop(chunk, None)
            moves.evict.append(chunk)
        moves.fetch = sorted(wanted & residence.absent)
        self.evicted += len(moves.evict)
        self.moves[name] = moves

    def _save(self, residence: Residence, chunk: int, table: torch.Tensor) -> bool:
        """Copy a chunk to the host; False where there is no room. A complete chunk never changes: once is enough."""
        if self.used + self.chunk_bytes > self.limit:
            self.full = True
            return False
        block = residence.moved.get(chunk, int(table[chunk]))
        residence.host[chunk] = torch.cat([cache[block].flatten() for cache in self.caches]).cpu()
        return True

    def load(self, name: str, places: dict[int, int]) -> bool:
        """Chunks -> blocks that the scheduler gave them: from now on they are visible. False: the sequence is gone."""
        residence = self.residences.get(name)
        if residence is None:
            return False
        for chunk, block in places.items():
            if chunk not in residence.absent:
                continue
            first = 0
            for cache in self.caches:
                size = cache[block].numel()
                cache[block].view(-1).copy_(residence.host[chunk][first : first + size], non_blocking=True)
                first += size
            residence.absent.discard(chunk)
            residence.moved[chunk] = block
            self.fetched += 1
        return True

    def take_moves(self) -> dict[str, Moves]:
        """What the scheduler is to be told since the last time."""
        moves, self.moves = self.moves, {}
        return {name: move for name, move in moves.items() if move.evict or move.fetch}
