"""Level 1's selection: from joined scores to the compact ascending ids of the chunks that must be resident.

Which chunks are asked for is the rule of training and evaluation (indexer_train/selection.py); here come the protected
chunks, a floor, a hard cap (the hot pool's capacity), and what to do with a sequence that asks for more than the cap.

Some queries need nearly all of the history (MRCR: the n-th of many like notes). No resident set of a fixed size serves
them; an indexer with a calibrated threshold or coverage says so beforehand, because it asks for many chunks. With a
`Fallback` such a window is read with full attention, and counted.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from data_gen.core.chunks import Chunking
from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from data_gen.core.tensors import send
from indexer_train.scoring import select
from indexer_train.selection import Budget, Selection

Served = Literal["demand", "cap", "full"]
"""How a window was served: with what was asked for, with the best that the cap allows, or with everything."""


class Limits(Strict):
    """Fewest and most resident chunks, the protected ones included; the cap is the capacity of the ids' rows."""

    model_config = ConfigDict(frozen=True)

    floor: NonNegativeInt = 0
    cap: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.floor > self.cap:
            raise ValueError("floor must not exceed cap")
        return self

    def check(self, chunking: Chunking) -> None:
        """Raise InputError when the protected chunks alone exceed the cap."""
        if self.cap < chunking.sink + chunking.recent:
            raise InputError(
                f"cap: {self.cap} chunks cannot hold the {chunking.sink + chunking.recent} protected ones "
                f"(sink {chunking.sink}, recent {chunking.recent}); raise the cap or protect fewer"
            )


class Fallback(Strict):
    """full_above: a window whose demand exceeds this multiple of the cap gets full attention; up to it, the best chunks
    that the cap allows. Demand is what the bundle's threshold or coverage asks for beside the protected chunks."""

    model_config = ConfigDict(frozen=True)

    full_above: float = Field(default=1.0, ge=1)

    def check(self, selection: Selection) -> None:
        """Raise InputError where demand is not measured: the best so many are always as many."""
        if isinstance(selection, Budget):
            raise InputError(
                "fallback: the bundle serves a budget, which asks for the same number in every window; calibrate a "
                "threshold (lookahead calibrate --recall 0.9) or a coverage (--by coverage), or pass one"
            )


@dataclass(frozen=True)
class Resident:
    """The chunks that must be resident, a row for each sequence.

    ids: [B, cap] int32, ascending, -1 after the last; counts: [B] int32, ids in each row, -1 where scores are damaged;
    demand: [B] int32, how many the rule asked for beside the protected ones, before floor and cap.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    demand: torch.Tensor

    def row(self, sequence: int) -> torch.Tensor:
        """The ids of one sequence, [count] int32 (waits for the device)."""
        return self.ids[sequence, : int(self.counts[sequence])]

    def cpu(self) -> "Resident":
        """The same on the CPU, by one copy."""
        both = torch.cat([self.ids, self.counts[:, None], self.demand[:, None]], dim=1).cpu()
        return Resident(both[:, :-2], both[:, -2], both[:, -1])

    def checked(self) -> "Resident":
        """Itself (waits for the device). Raises InputError for a row whose scores were NaN or infinite."""
        if bool((self.counts < 0).any()):
            raise InputError("a chunk's score is NaN or infinite; the keys or the indexer's weights are damaged")
        return self


def resident_chunks(
    scores: torch.Tensor,
    positions: torch.Tensor,
    chunking: Chunking,
    selection: Selection,
    limits: Limits,
) -> Resident:
    """The protected chunks and those that the rule asks for, at least `floor` and at most `cap` of them, best first.

    scores: [B, N] fp32 joined logits; positions: [B], the newest token of each sequence. Chunks of a row beyond those
    visible at its position are never chosen. Raises InputError for a cap below protection, scores of too few chunks,
    or NaN or infinity among them.
    """
    return unchecked_chunks(scores, positions, chunking, selection, limits).checked()


def unchecked_chunks(
    scores: torch.Tensor,
    positions: torch.Tensor,
    chunking: Chunking,
    selection: Selection,
    limits: Limits,
) -> Resident:
    """As `resident_chunks`, but damaged scores are not refused: their sequence's count is -1.

    scores: [B, N]; positions: [B]. With positions on the CPU a GPU is not waited for.
    """
    limits.check(chunking)
    candidate, protected, sound = _marks(scores, positions, chunking)
    chosen = selection.choose(scores, candidate, positions, chunking)
    demand, fixed = chosen.sum(dim=1), protected.sum(dim=1)
    kept = demand.clamp(limits.floor - fixed, limits.cap - fixed)
    if scores.is_cuda or not torch.equal(kept, demand):  # a GPU selects sooner than it says whether it must
        chosen = select(scores, candidate, kept)
    found = _compact(chosen | protected, limits.cap, demand)
    return Resident(found.ids, found.counts.where(sound, -1), found.demand)


def serve(
    resident: Resident, sequence: int, total: int, cap: int, protected: int, fallback: Fallback | None
) -> tuple[torch.Tensor, Served]:
    """(chunks to keep, [R] int64 ascending on the CPU; how). total: chunks so far, `protected` of them protected."""
    asked = int(resident.demand[sequence]) + protected
    if asked <= cap:
        return resident.row(sequence).long().cpu(), "demand"
    if fallback is not None and asked > fallback.full_above * cap:
        return torch.arange(total), "full"
    return resident.row(sequence).long().cpu(), "cap"


def _marks(
    scores: torch.Tensor, positions: torch.Tensor, chunking: Chunking
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which chunks compete and which are protected, [B, N] bool each; whose scores are sound, [B] bool."""
    spans = [(*chunking.candidates(place), chunking.visible(place)) for place in positions.tolist()]
    if scores.ndim != 2 or len(scores) != len(spans):
        raise InputError(f"scores {list(scores.shape)} are not [sequences, chunks] of {len(spans)} positions")
    if (longest := max(visible for *_, visible in spans)) > scores.shape[1]:
        raise InputError(
            f"scores of {scores.shape[1]} chunks, but a position sees {longest}; score all that are visible"
        )
    first, last, visible = send(torch.tensor(spans), scores.device).T[:, :, None]
    chunk = torch.arange(scores.shape[1], device=scores.device)
    candidate = (chunk >= first) & (chunk < last)
    return candidate, (chunk < visible) & ~candidate, ((scores < torch.inf) | ~candidate).all(dim=1)


def _compact(marks: torch.Tensor, cap: int, demand: torch.Tensor) -> Resident:
    """Marked columns as ids, without a sort: each goes where the count of marks before it says. marks: [B, N] bool."""
    place = marks.cumsum(dim=1) - 1
    ids = torch.full((len(marks), cap + 1), -1, dtype=torch.int32, device=marks.device)
    column = torch.arange(marks.shape[1], dtype=torch.int32, device=marks.device).expand(marks.shape)
    ids.scatter_(1, place.masked_fill(~marks, cap), column)
    return Resident(ids[:, :cap].contiguous(), marks.sum(dim=1).int(), demand.int())
