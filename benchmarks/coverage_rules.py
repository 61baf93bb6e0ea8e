"""The rules of benchmarks/coverage.py: how many of a window's best chunks are kept, by one setting."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from indexer_train.model import MemoryIndexer
from indexer_train.scoring import covering


@dataclass(frozen=True)
class Scored:
    """What a refresh may choose from. scores: of the candidates, best first [n] fp64; visible: chunks."""

    scores: torch.Tensor
    visible: int


Count = Callable[[Scored, float], int]
"""(window, setting) -> how many of the best are kept."""


@dataclass(frozen=True)
class Rule:
    """count: never falls while the setting goes from `fewest` to `most`."""

    count: Count
    fewest: float
    most: float

    def calibrated(self, measure: Callable[[Count, float], float], target: float) -> float:
        """The setting with which `measure`, that rises with what is kept, comes nearest to `target`."""
        low, high = self.fewest, self.most
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (low, middle) if measure(self.count, middle) > target else (middle, high)
        return min((low, high), key=lambda setting: abs(measure(self.count, setting) - target))


def by_budget(window: Scored, setting: float) -> int:
    """A share of the visible chunks."""
    return max(1, int(setting * window.visible))


def by_threshold(window: Scored, setting: float) -> int:
    """All that reach a score."""
    return int((window.scores >= setting).sum())


def by_coverage(window: Scored, setting: float, layers: int) -> int:
    """What a bundle's `Coverage` of the setting keeps; layers: of so many logits that a score sums, the mean is taken
    for the score."""
    scores = (window.scores / layers)[None]
    return int(covering(scores, torch.ones_like(scores, dtype=torch.bool), setting).sum())


def limited(count: Count, share: float) -> Count:
    """The same, at least a quarter and at most four times a share of the visible chunks."""

    def counted(window: Scored, setting: float) -> int:
        return min(max(count(window, setting), by_budget(window, share / 4)), by_budget(window, 4 * share))

    return counted


BUDGET = Rule(by_budget, 0.0, 1.0)


def rules_of(indexer: MemoryIndexer) -> dict[str, Rule]:
    """The rules that are compared with a budget."""
    rules = {
        "threshold": Rule(by_threshold, 1e4, -1e4),
        "coverage": Rule(partial(by_coverage, layers=1), 0.0, 1.0),
    }
    if indexer.spec.shape.join == "sum":
        rules["sharp coverage"] = rules["coverage"]
        rules["coverage"] = Rule(partial(by_coverage, layers=len(indexer.spec.layers)), 0.0, 1.0)
    return rules
