"""How serving chooses among scored chunks: the best so many (a budget), all that reach a calibrated threshold, or the
fewest that are predicted to hold a share of the attention (a coverage)."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import ConfigDict, Field, PositiveInt, model_validator

from data_gen.core.chunks import Chunking
from data_gen.core.config import Strict
from data_gen.core.tensors import send
from indexer_train.scoring import above, covering, select

Target = Literal["budget", "recall"]
"""What a rule was calibrated for: a mean share of the chunks kept, or a mass recall."""


class Budget(Strict):
    """The best `budget` of the visible chunks, in every context alike."""

    model_config = ConfigDict(frozen=True)

    by: Literal["budget"] = "budget"
    budget: float = Field(gt=0, le=1)

    def choose(
        self, scores: torch.Tensor, candidate: torch.Tensor, positions: torch.Tensor, chunking: Chunking
    ) -> torch.Tensor:
        """scores, candidate: [W, N]; positions: [W], where the sets are fixed. Returns the selected ones, [W, N]."""
        kept = [chunking.kept(self.budget, position) for position in positions.tolist()]
        return select(scores, candidate, send(torch.tensor(kept), scores.device))

    def __str__(self) -> str:
        return f"the best {self.budget:.1%} of the chunks"


class Cut(Strict):
    """Chunks that score at least `score` are selected, in contexts of up to `longest` tokens (None: of any length)."""

    model_config = ConfigDict(frozen=True)

    longest: PositiveInt | None = None
    score: float


class Threshold(Strict):
    """All chunks that reach the score of their context's length.

    target, value: what the cuts were calibrated for, None where the score was given; cuts: from the shortest contexts
    to the longest; the last one holds for any length.
    """

    model_config = ConfigDict(frozen=True)

    by: Literal["threshold"] = "threshold"
    target: Target | None = None
    value: float | None = None
    cuts: list[Cut] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        lengths = [cut.longest for cut in self.cuts if cut.longest is not None]
        last = self.cuts[-1].longest is None and len(lengths) == len(self.cuts) - 1
        if not last or sorted(set(lengths)) != lengths:
            raise ValueError("cuts must ascend in length, and the last one hold for any")
        return self

    def scores(self, positions: torch.Tensor) -> torch.Tensor:
        """The score to reach in a context that ends at each of `positions`: [W] -> [W] fp32."""
        ends = torch.tensor([cut.longest for cut in self.cuts[:-1]], dtype=torch.int64, device=positions.device)
        values = torch.tensor([cut.score for cut in self.cuts], device=positions.device)
        return values[torch.searchsorted(ends, positions + 1)]

    def choose(
        self, scores: torch.Tensor, candidate: torch.Tensor, positions: torch.Tensor, chunking: Chunking
    ) -> torch.Tensor:
        """As `Budget.choose`, [W, N] bool; how many chunks that makes differs from window to window."""
        return above(scores, candidate, send(self.scores(positions)[:, None], scores.device))

    def __str__(self) -> str:
        cuts = [f"{cut.score:.4g}" + (f" up to {cut.longest} tokens" if cut.longest else "") for cut in self.cuts]
        return f"scores from {', '.join(cuts)}" + _aim(self.target, self.value)


class Coverage(Strict):
    """The fewest best chunks that hold a `share` of the unprotected attention, as the scores predict it.

    The prediction is the softmax of the joined scores over the unprotected chunks, which is what a listwise loss trains
    them for. A constant added to all scores of a window, which such a loss does not see, changes nothing. target,
    value: as of `Threshold`.
    """

    model_config = ConfigDict(frozen=True)

    by: Literal["coverage"] = "coverage"
    target: Target | None = None
    value: float | None = None
    share: float = Field(gt=0, le=1)

    def choose(
        self, scores: torch.Tensor, candidate: torch.Tensor, positions: torch.Tensor, chunking: Chunking
    ) -> torch.Tensor:
        """As `Threshold.choose`, [W, N] bool; at least one candidate of each window."""
        return covering(scores, candidate, self.share)

    def __str__(self) -> str:
        return f"the best chunks up to a predicted share of {self.share:.6g}" + _aim(self.target, self.value)


Selection = Annotated[Budget | Threshold | Coverage, Field(discriminator="by")]


def _aim(target: Target | None, value: float | None) -> str:
    """What a rule was calibrated for, in words."""
    return "" if target is None else f" ({'to keep' if target == 'budget' else 'for a mass recall of'} {value:.1%})"


def served_first(selection: Selection, others: Iterable[Selection]) -> list[Selection]:
    """`selection`, then the others, less what it replaces: another budget, or the same rule for the same target."""

    def aim(of: Selection) -> tuple:
        return (of.by,) if isinstance(of, Budget) else (of.by, of.target, of.value)

    return [selection, *(other for other in others if aim(other) != aim(selection))]
