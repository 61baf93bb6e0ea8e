"""Thresholds and coverages from held-out traces: for a share of the chunks, or of the attention mass."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from data_gen.core.errors import InputError
from indexer_train.measure.metrics import (
    DocumentScorer,
    ServedWindows,
    golden_recall,
    mass_recall,
    needed_mass,
    peak_entropy,
)
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import remaining
from indexer_train.selection import Coverage, Cut, Selection, Target, Threshold
from indexer_train.spec import Metric

TEMPERATURES = tuple(2.0**power for power in range(-4, 3))
"""Factors of the scores at which the peak entropy is taken, the best of them counting: only their order is served."""


@dataclass(frozen=True)
class ScoredWindows:
    """A document's serving windows and the scores [W, N] that the indexer gives their chunks."""

    served: ServedWindows
    scores: torch.Tensor

    def choose(self, selection: Selection) -> torch.Tensor:
        """[W, N] bool, as serving would."""
        served = self.served
        return selection.choose(self.scores, served.labels.candidate, served.positions, served.document.trace.chunking)

    def means(self, selection: Selection, golden: float) -> dict[str, torch.Tensor]:
        """Of every window [W]: mass_recall, golden_recall, and kept, the share of visible chunks selected."""
        chosen, labels = self.choose(selection), self.served.labels
        return {
            "mass_recall": mass_recall(chosen, labels),
            "golden_recall": golden_recall(chosen, labels, golden),
            "kept": chosen.sum(dim=1) / self.served.visible,
        }


def score_windows(indexer: MemoryIndexer, windows: Iterable[ServedWindows]) -> list[ScoredWindows]:
    """Every document's windows, scored once. Raises InputError on NaN or infinite scores: they rank nothing."""
    scored = [ScoredWindows(each, DocumentScorer(indexer, each.document).joined_scores(each)) for each in windows]
    if not all(bool(each.scores.isfinite().all()) for each in scored):
        raise InputError(
            "the indexer's scores are NaN or infinite: training diverged (lower train.learning_rate and train into "
            "another folder; checkpoints from before remain), or the indexer is damaged"
        )
    return scored


def task_mean(scored: Sequence[ScoredWindows], values: Sequence[torch.Tensor]) -> dict[str, float]:
    """Of values [W] of each document: mean over windows, over a task's documents, over tasks. NaN counts nowhere.

    Returns the mean of each task and, under "", of all.
    """
    weights = _weights(scored, [~value.isnan() for value in values])
    totals: dict[str, list[float]] = {}
    for document, value, weight in zip(scored, values, weights, strict=True):
        task = totals.setdefault(document.served.document.meta.task, [0.0, 0.0])
        task[0] += float((value.double().nan_to_num(0.0) * weight).sum())
        task[1] += float(weight.sum())
    tasks = {task: total / weight for task, (total, weight) in totals.items() if weight}
    return tasks | {"": sum(tasks.values()) / len(tasks) if tasks else float("nan")}


def mean_peak_entropy(scored: Sequence[ScoredWindows]) -> float:
    """`task_mean` over all tasks of the peak entropy in nats, at the factor of TEMPERATURES where it is lowest."""
    return min(
        task_mean(scored, [peak_entropy(factor * each.scores, each.served.labels) for each in scored])[""]
        for factor in TEMPERATURES
    )


def measure(scored: Sequence[ScoredWindows], selections: Iterable[Selection], golden: float, data: str) -> list[Metric]:
    """What each way of selecting finds and keeps, by task and over `all` tasks. data: what to call the documents."""
    rows = []
    for selection in selections:
        means = [each.means(selection, golden) for each in scored]
        tasks: dict[str, dict[str, float]] = {}
        for name in means[0]:
            for task, value in task_mean(scored, [each[name] for each in means]).items():
                if not math.isnan(value):
                    tasks.setdefault(task or "all", {})[name] = value
        rows += [Metric(data=data, task=task, selection=str(selection), values=found) for task, found in tasks.items()]
    return rows


def calibrate(scored: Sequence[ScoredWindows], target: Target, value: float, longest: Sequence[int] = ()) -> Threshold:
    """The threshold that keeps `value` of the chunks, or reaches a mass recall of `value`, in the mean of `task_mean`.

    longest: context lengths in tokens that get a score of their own, up to each of them and beyond the last. Raises
    InputError where there is no window to calibrate on, or where all chunks together lack the asked recall.
    """
    ends = sorted(set(longest))
    cuts = []
    for low, high in zip([0, *ends], [*ends, None], strict=True):
        inside = [_between(each.served.positions + 1, low, high) for each in scored]
        if any(bool(mask.any()) for mask in inside):
            cuts.append(Cut(longest=high, score=_cut(scored, inside, target, value)))
        elif high is not None or not cuts:
            raise InputError(f"no held-out window in contexts of {low + 1} to {high or 'any number of'} tokens")
    if cuts[-1].longest is not None:  # no longer context was there: the longest ones' score holds beyond
        cuts[-1] = Cut(score=cuts[-1].score)
    return Threshold(target=target, value=value, cuts=cuts)


def calibrate_coverage(scored: Sequence[ScoredWindows], target: Target, value: float) -> Coverage:
    """The coverage that does the same, at contexts of every length; raises as `calibrate` does.

    A threshold on what remains from a chunk on downwards (`remaining`), whose highest is 1: the share lies in the
    middle between keeping its last chunks and keeping the next, where no rounding decides.
    """
    rest = [replace(each, scores=remaining(each.scores, each.served.labels.candidate)) for each in scored]
    cut = calibrate(rest, target, value).cuts[0].score
    lower = [each.scores[each.scores < cut] for each in rest]
    below = max((float(scores.max()) for scores in lower if len(scores)), default=0.0)
    share = 1 - (cut + below) / 2
    if target == "budget" and below > 0:  # a remainder that fp64 does not tell from 0 is not kept
        share = min(share, 1 - torch.finfo(torch.float64).eps / 2)
    return Coverage(target=target, value=value, share=share)


def _between(lengths: torch.Tensor, low: int, high: int | None) -> torch.Tensor:
    return (lengths > low) if high is None else (lengths > low) & (lengths <= high)


def _weights(scored: Sequence[ScoredWindows], counted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each window [W] weighs in a mean over windows, documents and tasks, of those `counted` ([W] bool)."""
    documents: dict[str, int] = {}
    for each, mask in zip(scored, counted, strict=True):
        if bool(mask.any()):
            task = each.served.document.meta.task
            documents[task] = documents.get(task, 0) + 1
    shares = [len(documents) * documents.get(each.served.document.meta.task, 1) for each in scored]
    return [mask / (int(mask.sum()) or 1) / share for mask, share in zip(counted, shares, strict=True)]


def _cut(scored: Sequence[ScoredWindows], inside: Sequence[torch.Tensor], target: Target, value: float) -> float:
    """The highest score with a recall of `value`, or the lowest that keeps no more (but the best at least)."""
    gains = []
    for each in scored:
        labels = each.served.labels
        if target == "budget":
            gains.append(1 / each.served.visible.double()[:, None].expand_as(labels.mass))
        else:
            gains.append(labels.mass / needed_mass(labels)[:, None])
    counted = [mask & ~gain[:, 0].isnan() for mask, gain in zip(inside, gains, strict=True)]
    weights = _weights(scored, counted)
    candidates = [each.served.labels.candidate & mask[:, None] for each, mask in zip(scored, counted, strict=True)]
    scores = torch.cat([each.scores[chosen] for each, chosen in zip(scored, candidates, strict=True)])
    gain = torch.cat([(g * w[:, None])[c] for g, w, c in zip(gains, weights, candidates, strict=True)])
    scores, order = scores.sort(descending=True)
    ends = torch.nn.functional.pad(scores.diff() != 0, (0, 1), value=True)  # equal scores are selected together
    scores, reached = scores[ends], gain[order].cumsum(0)[ends]
    if target == "budget":
        return float(scores[max(0, int((reached <= value + 1e-9).sum()) - 1)])
    if not len(reached) or float(reached[-1]) < value - 1e-9:
        held = float(reached[-1]) if len(reached) else 0.0
        raise InputError(
            f"a mass recall of {value:.1%} cannot be reached: all chunks that the traces name together hold {held:.1%}"
        )
    return float(scores[int((reached < value - 1e-9).sum())])
