"""One training step: losses, their gradients, and on a GPU one CUDA graph that replays both without launch gaps."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.pocket.config import LossConfig, StageConfig
from recipes.pocket.family import OPEN, Model, PocketFamily
from recipes.pocket.tasks import TASKS

METRICS = ("answer", "text", "kl")  # then hits and counts of each task


def losses(
    family: PocketFamily, model: Model, tokens: Tensor, tasks: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:
    """Total loss (scalar) and metrics [3 + 2 * tasks], fp32. tokens, tasks: [B, L]; see batches.py."""
    batch, length = tokens.shape
    wanted = F.pad(tasks[:, 1:], (0, 1), value=-1)
    answers = wanted >= 0
    with family.probe(model, model.config.index_topk, config.answer_rows, answers) as probe:
        logits = family.logits(model, tokens)
    surprise = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    surprise = F.pad(surprise.view(batch, length - 1), (0, 1))
    answer = (surprise * answers).sum() / answers.sum().clamp(min=1)
    text = (surprise * ~answers).sum() / (~answers).sum()
    kl = reduce(torch.add, (reading.kl for reading in probe.readings))
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    asked = wanted[:, :-1, None] == torch.arange(len(TASKS), device=tokens.device)  # [B, L - 1, tasks]
    hits, counts = (asked * right.unsqueeze(-1)).sum((0, 1)), asked.sum((0, 1))
    parts = torch.stack([answer, text, kl])
    total = answer + config.text * text + config.indexer * kl
    return total, torch.cat([parts, hits, counts]).detach().float()


class Step:
    """Computes gradients for batches of one shape; captured once and replayed when the model is on a GPU."""

    def __init__(self, family: PocketFamily, model: Model, stage: StageConfig, config: LossConfig) -> None:
        family.set_topk(model, model.config.index_topk if stage.sparse else OPEN)
        model.zero_grad(set_to_none=True)
        self.family, self.model, self.config = family, model, config
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, tasks: Tensor) -> Tensor:
        """Leave the gradients in the parameters; return the metrics."""
        if not next(self.model.parameters()).is_cuda:
            self.model.zero_grad(set_to_none=True)
            return self._run(tokens, tasks)
        graph = self.graph or self._capture(tokens, tasks)
        self.tokens.copy_(tokens, non_blocking=True)
        self.tasks.copy_(tasks, non_blocking=True)
        graph.replay()
        return self.metrics.clone()

    def _run(self, tokens: Tensor, tasks: Tensor) -> Tensor:
        loss, metrics = losses(self.family, self.model, tokens, tasks, self.config)
        loss.backward()
        return metrics

    def _capture(self, tokens: Tensor, tasks: Tensor) -> torch.cuda.CUDAGraph:
        self.tokens, self.tasks = tokens.cuda(), tasks.cuda()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(self.tokens, self.tasks)
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.metrics = self._run(self.tokens, self.tasks)
        return self.graph
