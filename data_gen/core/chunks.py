"""Which chunks exist, which are protected, and how many a budget buys."""

from pydantic import BaseModel, ConfigDict

from data_gen.core.config import Count, NoneOrMore


class Chunking(BaseModel):
    """How history is cut into chunks and which of them are always resident.

    tokens: tokens in a chunk; sink: how many chunks at the start are protected; recent: how many of the newest
    complete chunks are protected.
    Tokens after the newest complete chunk are resident too and belong to no chunk yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Count = 16
    sink: NoneOrMore = 1
    recent: NoneOrMore = 8

    def visible(self, position: int) -> int:
        """Complete chunks that the query token at 0-based `position` can see (its own chunk once it is the last)."""
        return (position + 1) // self.tokens

    def candidates(self, position: int) -> tuple[int, int]:
        """First and one-past-last unprotected chunk for a resident set fixed at `position`; equal when none."""
        return self.sink, max(self.sink, self.visible(position) - self.recent)

    @property
    def first_choice(self) -> int:
        """The first 0-based position that has an unprotected chunk to choose; every later one has, too."""
        return (self.sink + self.recent + 1) * self.tokens - 1

    def kept(self, budget: float, position: int) -> int:
        """Chunks that `budget` (a share of all visible chunks) buys on top of the protected ones: at least one."""
        return max(1, int(budget * self.visible(position)))
