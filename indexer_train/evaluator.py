"""The held-out metric that selects checkpoints: attention-mass recall at the recipe's budget, as served."""

import statistics
from collections import defaultdict

from sentence_transformers.base.evaluation import BaseEvaluator

from data_gen.store import TraceStore
from indexer_train.metrics import indexer_scores, mass_recall, served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import select


class MassRecallEvaluator(BaseEvaluator):
    """Mean over documents of a task, then over tasks, of the mass recall at one budget."""

    def __init__(self, store: TraceStore, budget: float) -> None:
        super().__init__()
        self.served = list(served_windows(store))
        self.budget = budget
        self.primary_metric = "mass_recall"

    def __call__(
        self, model: MemoryIndexer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """{mass_recall, mass_recall_TASK ...}; writes nothing: the trainer logs it."""
        model.eval()
        by_task = defaultdict(list)
        for served in self.served:
            selected = select(indexer_scores(model, served), served.labels.candidate, served.kept(self.budget))
            by_task[served.document.meta.task].append(float(mass_recall(selected, served.labels).nanmean()))
        tasks = {f"mass_recall_{task}": statistics.fmean(values) for task, values in by_task.items()}
        return {"mass_recall": statistics.fmean(tasks.values()), **tasks}
