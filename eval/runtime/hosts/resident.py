"""Which chunks of a batch of sequences lie in which rows of a cache, and what moves when that changes.

Stock attention reads contiguous tensors, so resident rows stay compact and in the order of chunks, for all sequences of
a batch at once: a new set rewrites them. An engine with paged kernels takes `eval.serving.residency` instead, whose
`Table` (one sequence, slots in any order, owned before they can be read) has nothing in common but the purpose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_gen.core.errors import InputError

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
        return tuple(self.kept.shape)

    @property
    def fetched(self) -> int:
        return len(self.fetch[0])


class ResidentTable:
    """Which chunk lies in which row of the cache: the kept ones, then all that were made since.

    kept: [B, R] int64, ascending in each sequence, PAD first; fresh: the first chunk made since `kept` was fixed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Everything is resident, for any number of sequences."""
        self.kept, self.fresh = torch.empty(1, 0, dtype=torch.int64), 0

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

    def plan(self, resident: Sequence[torch.Tensor], total: int) -> Move:
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
        row = torch.searchsorted(old, new).clamp_max(max(old.shape[1] - 1, 0))
        held = (old.gather(1, row) == new) & (new != PAD) if old.shape[1] else torch.zeros_like(new, dtype=torch.bool)
        stay_to, fetch_to = held.nonzero(as_tuple=True), (~held & (new != PAD)).nonzero(as_tuple=True)
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
