"""Trains and measures the lightning indexers of a DeepSeek-V4 while it runs, through forward hooks only.

The mass of compressed entries is taken from their joint softmax with window and sink (see recipes/pocket/reading.py).
"""

from functools import partial

from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4Indexer

from recipes.pocket.reading import Probe, read_layer


class IndexerProbe(Probe):
    """Reads every CSA layer (see Probe)."""

    def __init__(self, model: nn.Module, topk: int, answer_rows: float, answers: Tensor) -> None:
        super().__init__(model, topk, answer_rows, answers)
        self.kept: dict[str, Tensor] = {}
        for attention in (module for module in model.modules() if isinstance(module, DeepseekV4Attention)):
            indexer = getattr(attention.compressor, "indexer", None)
            if isinstance(indexer, DeepseekV4Indexer):
                self.handles += [
                    indexer.register_forward_pre_hook(self._detach),
                    indexer.scorer.register_forward_hook(partial(self._keep, "scores")),
                    indexer.register_forward_hook(partial(self._keep, "picks")),
                    attention.register_forward_hook(self._read),
                ]

    @staticmethod
    def _detach(_: nn.Module, inputs: tuple) -> tuple:
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)

    def _keep(self, name: str, _: nn.Module, __: tuple, output: Tensor) -> None:
        self.kept[name] = output

    def _read(self, _: nn.Module, __: tuple, output: tuple[Tensor, Tensor]) -> None:
        scores, picks = self.kept.pop("scores"), self.kept.pop("picks")
        self.readings.append(read_layer(scores, picks, output[1], self.answers, self.answer_rows, self.topk))
