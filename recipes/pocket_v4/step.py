"""One training step: losses, their gradients, and on a GPU one CUDA graph that replays both without launch gaps."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from recipes.pocket_v4.attention import no_mask
from recipes.pocket_v4.config import LossConfig, StageConfig
from recipes.pocket_v4.indexer import IndexerProbe
from recipes.pocket_v4.model import OPEN, set_topk
from recipes.pocket_v4.tasks import TASKS

METRICS = ("answer", "text", "kl")  # then hits and counts of each task


def losses(model: DeepseekV4ForCausalLM, tokens: Tensor, tasks: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Total loss (scalar) and metrics [3 + 2 * tasks], fp32. tokens, tasks: [B, L]; see batches.py."""
    batch, length = tokens.shape
    wanted = F.pad(tasks[:, 1:], (0, 1), value=-1)
    answers = wanted >= 0
    with (
        torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda, cache_enabled=False),
        IndexerProbe(model, model.config.index_topk, config.answer_rows, answers) as probe,
    ):
        logits = model(input_ids=tokens, attention_mask=no_mask(batch, length, tokens.device), use_cache=False).logits
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

    def __init__(self, model: DeepseekV4ForCausalLM, stage: StageConfig, config: LossConfig) -> None:
        set_topk(model, model.config.index_topk if stage.sparse else OPEN)
        model.zero_grad(set_to_none=True)
        self.model, self.config = model, config
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
        loss, metrics = losses(self.model, tokens, tasks, self.config)
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
