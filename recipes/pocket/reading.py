"""What a lightning indexer showed while the stock model ran: its KL, and its recall of attention mass.

Target of a query row: attention mass of what can be picked, summed over heads, normalised over what the row attends to
(DeepSeek's DSA warm-up). Rows count by their mass: a row that looks nowhere far has nothing to teach.
"""

from dataclasses import dataclass
from functools import reduce
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


@dataclass
class Reading:
    """What one layer showed, as scalars: KL; attention mass of the answer rows; its part on the best entries."""

    kl: Tensor
    mass: Tensor
    found: Tensor


def recall(readings: list[Reading]) -> Tensor:
    """Share of the answer rows' attention mass on each layer's best entries, all layers together: a scalar.

    Says something only with sparse attention open, and more entries than best ones: else it is 1 by construction.
    """
    found, mass = (reduce(torch.add, parts) for parts in zip(*((r.found, r.mass) for r in readings), strict=True))
    return found / mass.clamp(min=1e-9)


class Probe:
    """Context manager around a forward pass; afterwards `readings` holds one Reading a layer with an indexer.

    topk: entries counted by the recall. answer_rows: share of the KL given to the rows in `answers` [B, S] (bool).
    Subclasses hang their hooks into `handles`; what reaches an indexer is detached: the KL trains nothing else.
    """

    def __init__(self, model: torch.nn.Module, topk: int, answer_rows: float, answers: Tensor) -> None:
        self.topk, self.answer_rows, self.answers = topk, answer_rows, answers
        self.readings: list[Reading] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()


def read_layer(scores: Tensor, picks: Tensor, mass: Tensor, answers: Tensor, answer_rows: float, topk: int) -> Reading:
    """KL from the picked entries' mass to the softmax of their scores, and recall of mass by the best `topk`.

    scores, mass: [B, S, T]. picks: [B, S, k] entries in descending score, -1 for none. answers: [B, S] bool.
    """
    valid = picks >= 0
    chosen = picks.clamp(min=0)
    logits = scores.float().gather(-1, chosen).masked_fill(~valid, -1e9)
    target = mass.gather(-1, chosen).masked_fill(~valid, 0.0)
    total = target.sum(-1)  # [B, S]
    share = target / total.clamp(min=1e-9).unsqueeze(-1)
    divergence = (torch.xlogy(share, share) - share * logits.log_softmax(-1)).sum(-1)
    rows = torch.stack([total * answers, total * ~answers])  # [2, B, S]
    parts = (rows * divergence).sum((1, 2)) / rows.sum((1, 2)).clamp(min=1e-9)
    found = (target[..., :topk].sum(-1) * answers).sum()
    return Reading(answer_rows * parts[0] + (1 - answer_rows) * parts[1], rows[0].sum(), found)
