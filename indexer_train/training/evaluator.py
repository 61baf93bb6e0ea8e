"""The held-out metrics that select checkpoints: peak entropy, and mass recall of what would be served."""

from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from data_gen.traces.store import TraceStore
from indexer_train.config import Rule
from indexer_train.measure.calibration import (
    ScoredWindows,
    calibrate,
    calibrate_coverage,
    mean_peak_entropy,
    score_windows,
    task_mean,
)
from indexer_train.measure.metrics import mass_recall, served_windows
from indexer_train.selection import Budget, Selection


class MassRecallEvaluator(BaseEvaluator):
    """Mean over documents of a task, then over tasks, of two metrics: the mass recall of what is selected, and the peak
    entropy, which sees the whole ranking and needs no selection.

    select: the best `budget` of every window's chunks, or what the one threshold or coverage selects that keeps as many
    on the whole, calibrated again for each checkpoint.
    """

    def __init__(self, store: TraceStore, budget: float, select: Rule = "budget") -> None:
        super().__init__()
        self.served = list(served_windows(store))
        self.budget, self.select = budget, select
        self.primary_metric = "mass_recall"

    def selection(self, scored: list[ScoredWindows]) -> Selection:
        """What is served."""
        if self.select == "budget":
            return Budget(budget=self.budget)
        by = calibrate if self.select == "threshold" else calibrate_coverage
        return by(scored, "budget", self.budget)

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """{mass_recall, mass_recall_TASK ..., peak_entropy} of a MemoryIndexer; writes nothing: the trainer logs it."""
        model.eval()
        scored = score_windows(model, self.served)
        selection = self.selection(scored)
        means = task_mean(scored, [mass_recall(each.choose(selection), each.served.labels) for each in scored])
        found = {f"mass_recall_{task}" if task else "mass_recall": value for task, value in means.items()}
        return found | {"peak_entropy": mean_peak_entropy(scored)}
