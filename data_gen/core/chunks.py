"""Which chunks exist, which are protected, and how many a budget buys."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_gen.core.config import Count


class Chunking(BaseModel):
    """How history is cut into chunks and which of them are always resident.

    tokens: tokens in a chunk; sink: protected chunks at the start; recent: protected newest complete chunks.
    Tokens behind the newest complete chunk are resident too and belong to no chunk yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Count = 16
    sink: int = Field(default=1, lt=1 << 31)
    recent: int = Field(default=8, lt=1 << 31)

    @model_validator(mode="after")
    def _not_negative(self) -> Self:
        if self.sink < 0 or self.recent < 0:
            raise ValueError("sink and recent must not be negative")
        return self

    def visible(self, position: int) -> int:
        """Complete chunks that the query token at 0-based `position` can see (its own chunk once it is the last)."""
        return (position + 1) // self.tokens

    def candidates(self, position: int) -> tuple[int, int]:
        """First and one-past-last unprotected chunk for a resident set fixed at `position`; equal when none."""
        return self.sink, max(self.sink, self.visible(position) - self.recent)

    def kept(self, budget: float, position: int) -> int:
        """Chunks that `budget` (a share of all visible chunks) buys on top of the protected ones: at least one."""
        return max(1, int(budget * self.visible(position)))
