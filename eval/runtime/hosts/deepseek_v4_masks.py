"""Keep the stock DeepSeek-V4 modules causal over resident rows: they take row r for chunk r, in every sequence.

One new token sees every resident chunk, so the stock masks are right as they are. With several new tokens, or with
sequences that keep different numbers of chunks, hooks hide the rows that a token must not see.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.deepseek_v4_hooks import arguments, csa_layers
from data_gen.core.errors import InputError
from eval.runtime.hosts.deepseek_v4_cache import ResidentCsaCache
from eval.runtime.hosts.resident import PAD


@contextmanager
def resident_masks(model: PreTrainedModel) -> Iterator[None]:
    """Mask `model`'s CSA layers by chunk while the context is open, wherever they read a ResidentCsaCache.

    Reading a padded batch into such a cache raises InputError: the stock model compresses padding with the text.
    """
    decoder = model.get_decoder()
    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(_refuse_padding, with_kwargs=True).remove)
        for layer in csa_layers(model):
            for handle in _RowMask(decoder.layers[layer].self_attn.compressor.indexer).attach():
                hooks.callback(handle.remove)
        yield


class _RowMask:
    """Hides rows from one native indexer. hidden: [B, S, rows] of the call at work, None when stock masks do."""

    def __init__(self, indexer: nn.Module) -> None:
        self.indexer = indexer
        self.hidden: torch.Tensor | None = None

    def attach(self) -> list[Any]:
        return [
            self.indexer.register_forward_pre_hook(self._enters, with_kwargs=True),
            self.indexer.scorer.register_forward_hook(self._scored),
            self.indexer.register_forward_hook(self._picked),
        ]

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = arguments(module, args, kwargs)
        cache, positions, batch = given["past_key_values"], given["position_ids"], len(given["hidden_states"])
        self.hidden = None
        if not isinstance(cache, ResidentCsaCache) or not cache.table.evicted():
            return
        if positions.shape[1] == 1 and not cache.table.padded():
            return
        chunks = cache.table.chunks(cache.total, batch).to(positions.device)[:, None]
        made = (positions + 1) // module.compress_rate
        self.hidden = (chunks == PAD) | (chunks >= made[..., None])

    def _scored(self, module: nn.Module, args: tuple, scores: torch.Tensor) -> torch.Tensor | None:
        return None if self.hidden is None else scores.masked_fill(self.hidden, -torch.inf)

    def _picked(self, module: nn.Module, args: tuple, picks: torch.Tensor) -> torch.Tensor | None:
        """Hidden rows are picked only where too few others are left: no picks, then."""
        if self.hidden is None or not picks.shape[-1]:
            return None
        return picks.masked_fill(self.hidden.gather(-1, picks.clamp_min(0)), -1)


def _refuse_padding(module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = arguments(module, args, kwargs)
    mask = given.get("attention_mask")
    if isinstance(given.get("past_key_values"), ResidentCsaCache) and mask is not None and not bool(mask.all()):
        raise InputError(
            "a padded batch: DeepSeek-V4 compresses padding together with the text; "
            "give sequences of equal length without padding, or one at a time"
        )
