"""Level 1's selection: from joined scores to the compact ascending ids of what must be resident.

Which chunks are asked for is the rule of training and evaluation (indexer_train/selection.py); here come the protected
chunks, a floor, a hard cap (the hot pool's capacity), and whole pages for engines that move nothing smaller.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, model_validator

from data_gen.core.chunks import Chunking
from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE
from indexer_train.scoring import select
from indexer_train.selection import Budget, Threshold


class Limits(Strict):
    """Fewest and most resident units, the protected ones included; the cap is the capacity of the ids' rows.

    unit: single chunks, or pages of 64 for engines that move nothing smaller: then the pages of protected chunks and
    those in which the rule asks for most chunks are resident, and there is no floor, because beyond what is asked for
    no page is better than another.
    """

    model_config = ConfigDict(frozen=True)

    floor: NonNegativeInt = 0
    cap: PositiveInt
    unit: Literal["chunks", "pages"] = "chunks"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.floor > self.cap:
            raise ValueError("floor must not exceed cap")
        if self.floor and self.unit == "pages":
            raise ValueError("floor: of pages there is none; leave it out")
        return self

    def check(self, chunking: Chunking) -> None:
        """Raise InputError when the protected chunks alone, wherever they lie, exceed the cap."""
        straddled = -(-(chunking.recent - 1) // PAGE) + 1 if chunking.recent else 0
        if self.unit == "pages" and self.cap < (needed := -(-chunking.sink // PAGE) + straddled):
            raise InputError(
                f"cap: {self.cap} pages cannot hold the protected chunks (sink {chunking.sink}, recent "
                f"{chunking.recent} can lie in {needed}); raise the cap or protect fewer"
            )
        if self.unit == "chunks" and self.cap < chunking.sink + chunking.recent:
            raise InputError(
                f"cap: {self.cap} chunks cannot hold the {chunking.sink + chunking.recent} protected ones "
                f"(sink {chunking.sink}, recent {chunking.recent}); raise the cap or protect fewer"
            )


@dataclass(frozen=True)
class Resident:
    """What must be resident, per sequence: chunks, or pages of 64 chunks.

    ids: [B, cap] int32, ascending, -1 behind the last; counts: [B] int32, ids in each row; demand: [B] int32, how many
    the rule asked for beside the protected ones, before floor and cap.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    demand: torch.Tensor

    def row(self, sequence: int) -> torch.Tensor:
        """The ids of one sequence, [count] int32 (waits for the device)."""
        return self.ids[sequence, : int(self.counts[sequence])]


def resident_chunks(
    scores: torch.Tensor,
    positions: torch.Tensor,
    chunking: Chunking,
    selection: Budget | Threshold,
    limits: Limits,
) -> Resident:
    """The protected chunks and those that the rule asks for, at least `floor` and at most `cap` of them, best first.

    scores: [B, N] fp32 joined logits; positions: [B], the newest token of each sequence. Chunks of a row beyond those
    visible at its position are never chosen. Raises InputError for a cap below protection, scores of too few chunks,
    or NaN among them.
    """
    limits.check(chunking)
    candidate, protected = _marks(scores, positions, chunking)
    chosen = selection.choose(scores, candidate, positions.to(scores.device), chunking)
    demand, fixed = chosen.sum(dim=1), protected.sum(dim=1)
    kept = demand.clamp(limits.floor - fixed, limits.cap - fixed)
    if not torch.equal(kept, demand):
        chosen = select(scores, candidate, kept)
    return _compact(chosen | protected, limits.cap, demand)


def densest_pages(
    scores: torch.Tensor,
    positions: torch.Tensor,
    chunking: Chunking,
    selection: Budget | Threshold,
    limits: Limits,
) -> Resident:
    """The pages of protected chunks and, up to the cap, those in which the rule asks for most chunks.

    Arguments as `resident_chunks`; ids, counts, demand and the cap are of pages; ties go to the older page.
    """
    limits.check(chunking)
    candidate, protected = _marks(scores, positions, chunking)
    chosen = selection.choose(scores, candidate, positions.to(scores.device), chunking)
    fixed = _by_page(protected) > 0
    density = _by_page(chosen).masked_fill(fixed, 0)
    asked = density > 0
    best = select(density.float(), asked, limits.cap - fixed.sum(dim=1))
    return _compact(best | fixed, limits.cap, asked.sum(dim=1))


def _marks(scores: torch.Tensor, positions: torch.Tensor, chunking: Chunking) -> tuple[torch.Tensor, torch.Tensor]:
    """Which chunks compete and which are protected, [B, N] bool each."""
    spans = [(*chunking.candidates(place), chunking.visible(place)) for place in positions.tolist()]
    if scores.ndim != 2 or len(scores) != len(spans):
        raise InputError(f"scores {list(scores.shape)} are not [sequences, chunks] of {len(spans)} positions")
    if (longest := max(visible for *_, visible in spans)) > scores.shape[1]:
        raise InputError(
            f"scores of {scores.shape[1]} chunks, but a position sees {longest}; score all that are visible"
        )
    first, last, visible = torch.tensor(spans, device=scores.device).T[:, :, None]
    chunk = torch.arange(scores.shape[1], device=scores.device)
    candidate = (chunk >= first) & (chunk < last)
    if bool((scores.isnan() & candidate).any()):
        raise InputError("a chunk's score is NaN; the keys or the indexer's weights are damaged")
    return candidate, (chunk < visible) & ~candidate


def _by_page(marks: torch.Tensor) -> torch.Tensor:
    """Marks a page: [B, N] bool -> [B, ceil(N / 64)] int64."""
    return torch.nn.functional.pad(marks, (0, -marks.shape[1] % PAGE)).unflatten(1, (-1, PAGE)).sum(dim=2)


def _compact(marks: torch.Tensor, cap: int, demand: torch.Tensor) -> Resident:
    """Marked columns as ids, without a sort: each goes where the count of marks before it says. marks: [B, N] bool."""
    place = marks.cumsum(dim=1) - 1
    ids = torch.full((len(marks), cap + 1), -1, dtype=torch.int32, device=marks.device)
    column = torch.arange(marks.shape[1], dtype=torch.int32, device=marks.device).expand(marks.shape)
    ids.scatter_(1, place.masked_fill(~marks, cap), column)
    return Resident(ids[:, :cap].contiguous(), marks.sum(dim=1).int(), demand.int())
