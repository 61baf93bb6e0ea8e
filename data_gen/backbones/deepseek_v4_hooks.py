"""Watch the compressed sparse attention (CSA) layers of a Hugging Face DeepSeek-V4 at work, by hooks alone.

The stock modules run unchanged, so that what is observed is what the model computes, bit for bit. An observation
belongs to the thread that opened it: what other threads let the model read goes by unseen.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.core.errors import InputError

CSA = "compressed_sparse_attention"


@dataclass(frozen=True)
class CsaCall:
    """One call of one CSA layer in batch 1: S new tokens, N chunk keys so far.

    ordinal: which CSA layer, counted from 0; hidden: [S, hidden], entering the attention block; query: [S, H, d] after
    RoPE, weights: [S, H] scaled by (H d)^-0.5, keys: [N, d] after RoPE, all of the native indexer; picks: [S, k] its
    chunk ids, -1 for none; attention: [heads, S, N] core attention probabilities of the chunks, of a softmax over
    sliding window, chunks and sink.
    """

    ordinal: int
    hidden: torch.Tensor
    query: torch.Tensor
    weights: torch.Tensor
    keys: torch.Tensor
    picks: torch.Tensor
    attention: torch.Tensor


def csa_layers(model: PreTrainedModel) -> list[int]:
    """Layer indices of the CSA layers, in order: the one of ordinal i is the i-th."""
    return [index for index, kind in enumerate(model.config.layer_types) if kind == CSA]


def csa_attention(model: PreTrainedModel, layer: int) -> Any:
    """The attention block of a layer by its index; its parts are those of the stock class."""
    decoder: Any = model.get_decoder()
    return decoder.layers[layer].self_attn


@contextmanager
def observe_csa(model: PreTrainedModel, observer: Callable[[CsaCall], None]) -> Iterator[None]:
    """Report every call that this thread makes of `model`'s CSA layers to `observer` while the context is open."""
    with ExitStack() as hooks:
        for ordinal, layer in enumerate(csa_layers(model)):
            watch = _LayerWatch(ordinal, csa_attention(model, layer), observer)
            for handle in watch.attach():
                hooks.callback(handle.remove)
        yield


class _LayerWatch:
    """Gathers the parts of one call, in the order in which the modules run."""

    def __init__(self, ordinal: int, attention: Any, observer: Callable[[CsaCall], None]) -> None:
        self.ordinal, self.attention, self.observer = ordinal, attention, observer
        self.thread = threading.get_ident()
        self.hidden = self.query = self.keys = self.weights = self.picks = torch.empty(0)

    def attach(self) -> list[Any]:
        indexer = self.attention.compressor.indexer
        return [
            self.attention.register_forward_pre_hook(self._enters, with_kwargs=True),
            indexer.scorer.register_forward_pre_hook(self._scores, with_kwargs=True),
            indexer.register_forward_hook(self._picks),
            self.attention.register_forward_hook(self._leaves),
        ]

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self.thread

    # kwargs: None for a thread in which the hook is being added or removed.

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is None or self._elsewhere():
            return
        self.hidden = arguments(module, args, kwargs)["hidden_states"][0]

    def _scores(self, module: Any, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is None or self._elsewhere():
            return
        given = arguments(module, args, kwargs)
        self.query, self.keys = given["q"][0], given["compressed_kv"][0]
        heads, width = self.query.shape[1:]
        self.weights = module.weights_proj(given["hidden_states"])[0].float() * (heads * width) ** -0.5

    def _picks(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not self._elsewhere():
            self.picks = output[0]

    def _leaves(self, module: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._elsewhere():
            return
        if output[1] is None:
            raise InputError("the backbone reports no attention probabilities; load it with eager attention")
        probability = output[1][0]
        chunks = probability[..., probability.shape[-1] - len(self.keys) :]
        self.observer(
            CsaCall(self.ordinal, self.hidden, self.query, self.weights, self.keys, self.picks, attention=chunks)
        )
        self.hidden = self.query = self.keys = self.weights = self.picks = torch.empty(0)


def arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The call's arguments by name, however the caller passed them."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments
