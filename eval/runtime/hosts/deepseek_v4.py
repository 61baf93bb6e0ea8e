"""A Hugging Face DeepSeek-V4 as host of lookahead sparse attention: what the memory indexer reads, what it decides."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone, piece_tokens
from data_gen.backbones.deepseek_v4_hooks import arguments
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import SCALE_BYTES
from eval.runtime.hosts.base import ResidentBytes
from eval.runtime.hosts.deepseek_v4_cache import ResidentCsaCache
from eval.runtime.hosts.deepseek_v4_masks import resident_masks
from eval.runtime.hosts.moving import Prepared
from eval.runtime.hosts.resident import Move
from eval.serving.entries import EntryShape


class DeepseekV4Host:
    """A model and one batch of sequences that it decodes.

    layers: CSA ordinals that the memory indexer reads; pageable: as ColdPool's. Raises InputError when the model lacks
    one of the layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], pageable: bool | None = None) -> None:
        backbone = DeepseekV4Backbone(model)
        if unknown := sorted(set(layers) - set(backbone.info.full_layers)):
            raise InputError(f"the indexer reads CSA layers {unknown}, the model has {len(backbone.layers)} (from 0)")
        self.model, self.info, self.chunk_tokens = model, backbone.info, backbone.chunk_tokens
        self.layers = {ordinal: backbone.layers[ordinal] for ordinal in layers}
        self.cache = ResidentCsaCache(model.config, layers, pageable)

    def fork(self) -> "DeepseekV4Host":
        """An independent continuation of the same history."""
        twin = copy.copy(self)
        twin.cache = self.cache.fork()
        return twin

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Read into `cache` only while this is open: hooks mask evicted chunks and note what the newest token asks."""
        decoder = self.model.get_decoder()
        with ExitStack() as stack:
            stack.enter_context(resident_masks(self.model))
            for ordinal, layer in self.layers.items():
                attention = decoder.layers[layer].self_attn
                watch = attention.register_forward_pre_hook(partial(_remember, ordinal), with_kwargs=True)
                stack.callback(watch.remove)
            yield

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read tokens [B, S], in pieces that bound memory; returns the logits behind the last ones, [B, vocabulary].

        Raises InputError beyond the model's context.
        """
        if self.position + 1 + ids.shape[1] > self.info.context:
            raise InputError(
                f"{self.position + 1 + ids.shape[1]} tokens, the backbone's context is {self.info.context}"
            )
        with self.attached():
            while ids.shape[1]:
                size = piece_tokens(self.model, self.position + 1, len(ids))
                piece, ids = ids[:, :size].to(self.model.device), ids[:, size:]
                logits = self.model(piece, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
        return logits

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based."""
        return self.cache.get_seq_length() - 1

    def hidden(self) -> torch.Tensor:
        """What enters the attention block of the indexer's layers at the newest token: [B, layers, hidden] bf16."""
        return torch.stack([self.cache.newest[ordinal].to(self.model.device) for ordinal in self.layers], dim=1)

    def keys(self) -> torch.Tensor:
        """Keys of all chunks made so far, as a trace holds them: [B, N, layers, d + 4] uint8."""
        return self.cache.keys().to(self.model.device)

    def prepare(self, resident: Sequence[torch.Tensor]) -> Prepared:
        """Start fetching what is missing of a resident set, beside what is read next with the old one."""
        return self.cache.prepare(resident)

    def keep(self, resident: Sequence[torch.Tensor] | Prepared) -> Move:
        """Make exactly these chunks resident: one [R] of ascending ids a sequence. Chunks made later join them."""
        return self.cache.keep(resident)

    @property
    def chunk_bytes(self) -> int:
        """Entries and native index keys of one chunk in all CSA layers."""
        return self.cache.cold.unit_bytes

    def resident_bytes(self) -> ResidentBytes:
        """Summed over sequences."""
        config, chunks = self.model.config, sum(map(len, self.cache.resident()))
        key = self.info.key_width + SCALE_BYTES
        entry = EntryShape(config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim).bytes
        return ResidentBytes(
            tensors=self.cache.resident_bytes(),
            served=chunks * len(self.cache.csa) * (entry + key),
            keys=self.cache.total * self.cache.batch * len(self.layers) * key,
        )


def _remember(ordinal: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = arguments(module, args, kwargs)
    if isinstance(cache := given.get("past_key_values"), ResidentCsaCache):
        cache.newest[ordinal] = given["hidden_states"][:, -1].to(torch.bfloat16, copy=True)
