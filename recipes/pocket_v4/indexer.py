"""Trains and measures the lightning indexers while the stock model runs, through forward hooks only.

Target of a query row: attention mass of the compressed entries, summed over heads, taken from the joint softmax with
window and sink, then normalised over the entries the row attends to (DeepSeek's DSA warm-up). Rows count by their
mass: a row that looks nowhere far has nothing to teach. The indexer reads detached inputs: the KL trains nothing else.
"""

from dataclasses import dataclass
from functools import partial, reduce
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4Indexer


@dataclass
class Reading:
    """What one CSA layer showed, as scalars: KL; attention mass of the answer rows; its part on the best entries."""

    kl: Tensor
    mass: Tensor
    found: Tensor


def recall(readings: list[Reading]) -> Tensor:
    """Share of the answer rows' attention mass on each layer's best entries, all layers together.

    Says something only with sparse attention open, and more entries than best ones: else it is 1 by construction.
    """
    found, mass = (reduce(torch.add, parts) for parts in zip(*((r.found, r.mass) for r in readings), strict=True))
    return found / mass.clamp(min=1e-9)


class IndexerProbe:
    """Context manager around a forward pass; afterwards `readings` holds one Reading a CSA layer.

    topk: entries counted by the recall. answer_rows: share of the KL given to the rows in `answers` [B, S] (bool).
    """

    def __init__(self, model: DeepseekV4ForCausalLM, topk: int, answer_rows: float, answers: Tensor) -> None:
        self.topk = topk
        self.answer_rows = answer_rows
        self.answers = answers
        self.readings: list[Reading] = []
        self.kept: dict[str, Tensor] = {}
        self.handles = []
        for attention in (module for module in model.modules() if isinstance(module, DeepseekV4Attention)):
            indexer = getattr(attention.compressor, "indexer", None)
            if isinstance(indexer, DeepseekV4Indexer):
                self.handles += [
                    indexer.register_forward_pre_hook(self._detach),
                    indexer.scorer.register_forward_hook(partial(self._keep, "scores")),
                    indexer.register_forward_hook(partial(self._keep, "picks")),
                    attention.register_forward_hook(self._read),
                ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def _detach(_: nn.Module, inputs: tuple) -> tuple:
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)

    def _keep(self, name: str, _: nn.Module, __: tuple, output: Tensor) -> None:
        self.kept[name] = output

    def _read(self, _: nn.Module, __: tuple, output: tuple[Tensor, Tensor]) -> None:
        scores, picks = self.kept.pop("scores"), self.kept.pop("picks")
        self.readings.append(read_layer(scores, picks, output[1], self.answers, self.answer_rows, self.topk))


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
