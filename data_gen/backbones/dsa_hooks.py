"""Watch the lightning indexers of DeepSeek sparse attention (DSA: MLA whose layers attend to tokens an indexer picks).

DeepSeek-V3.2, GLM-5 and their relatives differ in what an indexer turns and how, not in what it scores:
sum_h w_h relu(q_h . k), of which the modules return the top-k alone. Hooks note what they compute on the way.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.layers import attention_modules
from data_gen.core.errors import InputError

PARTS = ("wq_b", "k_norm", "weights_proj", "n_heads", "head_dim", "qk_rope_head_dim", "index_topk", "softmax_scale")
"""What a lightning indexer over tokens has."""


@dataclass(frozen=True)
class IndexCall:
    """One call of one layer's indexer on S new tokens.

    query: [B, S, H, d] and content: [B, S, d], the new tokens' keys, both before RoPE; weights: [B, S, H], scaled by
    (H d)^-0.5; tables: (cos, sin) of the new tokens; picks: [B, S, k] tokens, later ones among them where there are
    fewer than k.
    """

    indexer: Any
    query: torch.Tensor
    content: torch.Tensor
    weights: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor]
    picks: torch.Tensor

    def turned(self, keys: torch.Tensor) -> torch.Tensor:
        """Queries after RoPE, [B, S, H, d]. keys: [B, S, d], those of the new tokens after RoPE, as the cache has them:
        the indexer's own functions are tried on the content until they come out. Raises InputError if none does."""
        for turn in _turns(self.indexer):
            made = turn(self.content.unsqueeze(2), self.tables).squeeze(2)
            if torch.allclose(made.float(), keys.float(), rtol=1e-2, atol=1e-3 * float(keys.float().abs().max())):
                return turn(self.query, self.tables)
        raise InputError(f"{type(self.indexer).__name__} rotates its keys in an unknown way")


Turn = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


def _turns(indexer: Any) -> Iterator[Turn]:
    """Ways to turn [B, S, H, d] by (cos, sin): its module's functions on the first or the last dims, and none."""
    module, width = sys.modules[type(indexer).__module__], indexer.qk_rope_head_dim
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave"):
        if (rotate := getattr(module, name, None)) is None:
            continue

        def first(states: torch.Tensor, tables: tuple, rotate: Any = rotate) -> torch.Tensor:
            moving, still = states[..., :width], states[..., width:]
            return torch.cat([rotate(moving, moving, *tables, unsqueeze_dim=2)[0], still], dim=-1)

        def last(states: torch.Tensor, tables: tuple, rotate: Any = rotate) -> torch.Tensor:
            still, moving = states[..., :-width], states[..., -width:]
            return torch.cat([still, rotate(moving, moving, *tables, unsqueeze_dim=2)[0]], dim=-1)

        yield from (first, last)
    yield lambda states, tables: states


def indexers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer -> its lightning indexer, none of a dense model; layers that take the picks of an earlier one are left out.

    Raises InputError for a layer whose indexer is of another kind.
    """
    found = {}
    for layer, attention in attention_modules(model).items():
        indexer: Any = getattr(attention, "indexer", None)
        if indexer is None:
            continue
        if missing := [part for part in PARTS if not hasattr(indexer, part)]:
            raise InputError(
                f"layer {layer}: sparse attention chosen by {type(indexer).__name__}, which has no "
                f"{', '.join(missing)}: it is not a lightning indexer over tokens"
            )
        found[layer] = indexer
    return found


@contextmanager
def observe_indexers(model: PreTrainedModel, watched: dict[int, nn.Module]) -> Iterator[dict[int, IndexCall]]:
    """Layer -> the newest call of its indexer in the thread that opened it, while the context is open."""
    calls: dict[int, IndexCall] = {}
    with ExitStack() as stack:
        for layer, indexer in watched.items():
            for handle in _IndexerWatch(layer, indexer, calls).attach():
                stack.callback(handle.remove)
        yield calls


class _IndexerWatch:
    """Hooks of one indexer."""

    def __init__(self, layer: int, indexer: Any, calls: dict[int, IndexCall]) -> None:
        self.layer, self.indexer, self.calls, self.thread = layer, indexer, calls, threading.get_ident()
        self.kept: dict[str, Any] = {}

    def attach(self) -> list[Any]:
        parts = {"query": self.indexer.wq_b, "content": self.indexer.k_norm, "weights": self.indexer.weights_proj}
        return [
            *(module.register_forward_hook(self._keep(name)) for name, module in parts.items()),
            self.indexer.register_forward_pre_hook(self._enters, with_kwargs=True),
            self.indexer.register_forward_hook(self._leaves),
        ]

    def _keep(self, name: str) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def note(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.kept[name] = output

        return note

    # kwargs: None for a thread in which the hook is being added or removed.
    def _enters(self, _: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is not None and threading.get_ident() == self.thread:
            self.kept["tables"] = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[2]

    def _leaves(self, _: nn.Module, __: tuple, picks: torch.Tensor) -> None:
        if threading.get_ident() != self.thread:
            return
        heads, width = self.indexer.n_heads, self.indexer.head_dim
        self.calls[self.layer] = IndexCall(
            self.indexer,
            self.kept["query"].unflatten(-1, (heads, width)),
            self.kept["content"],
            self.kept["weights"].float() * (heads**-0.5 * self.indexer.softmax_scale),
            self.kept["tables"],
            picks,
        )
        self.kept = {}
