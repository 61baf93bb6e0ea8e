"""A Hugging Face decoder with ordinary attention as host; sliding-window layers are left as they are."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.observe import observe
from data_gen.core.errors import InputError
from eval.runtime.hosts.base import ResidentBytes
from eval.runtime.hosts.dense_cache import ResidentCache
from eval.runtime.hosts.moving import Prepared
from eval.runtime.hosts.resident import PAD, Move

PIECE_TOKENS = 4096
"""Tokens of a sequence read at once: their mask over 131,072 earlier ones takes half a GiB, in torch's bool."""


class DenseHost:
    """A model and one batch of sequences that it decodes (see `Host`).

    layers: transformer layers that the memory indexer reads; pageable: as ColdPool's. Raises InputError when a layer
    has no full attention.
    """

    def __init__(
        self, model: PreTrainedModel, chunk_tokens: int, layers: Sequence[int], pageable: bool | None = None
    ) -> None:
        backbone = DenseBackbone(model)
        if unknown := sorted(set(layers) - set(backbone.info.full_layers)):
            raise InputError(
                f"the indexer reads layers {unknown}, full attention has the model in {backbone.info.full_layers} only"
            )
        self.model, self.info, self.modules = model, backbone.info, backbone.modules
        self.layers = list(layers)
        self.cache = ResidentCache(model.config, backbone.info.full_layers, chunk_tokens, layers, pageable)
        self._mask: torch.Tensor | None = None

    def fork(self) -> "DenseHost":
        """An independent continuation of the same history."""
        twin = copy.copy(self)
        twin.cache = self.cache.fork()
        return twin

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Read into `cache` only while this is open: hooks note what the newest token asks, and hide empty rows.

        Reading a padded batch into it raises InputError: chunks are counted from the first token of every sequence.
        """
        with ExitStack() as stack:
            stack.enter_context(observe(self.model, self.cache.remember))
            enters = self.model.get_decoder().register_forward_pre_hook(self._enters, with_kwargs=True)
            stack.callback(enters.remove)
            for module in self.modules.values():
                stack.callback(module.register_forward_pre_hook(self._hide_padding, with_kwargs=True).remove)
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
            for piece in ids.to(self.model.device).split(PIECE_TOKENS, dim=1):
                logits = self.model(piece, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
        return logits

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based."""
        return self.cache.get_seq_length() - 1

    def hidden(self) -> torch.Tensor:
        """What enters the attention block of the indexer's layers at the newest token: [B, layers, hidden] bf16."""
        return torch.stack([self.cache.newest[layer].to(self.model.device) for layer in self.layers], dim=1)

    def keys(self) -> torch.Tensor:
        """Mean keys of all complete chunks, as a trace holds them: [B, N, layers, KV * d] fp16."""
        return self.cache.chunk_keys(self.layers).to(self.model.device)

    def prepare(self, resident: Sequence[torch.Tensor]) -> Prepared:
        """Start fetching what is missing of a resident set, beside what is read next with the old one."""
        return self.cache.prepare(resident)

    def keep(self, resident: Sequence[torch.Tensor] | Prepared) -> Move:
        """Make exactly these chunks resident: one [R] of ascending ids a sequence. Chunks made later join them."""
        return self.cache.keep(resident)

    @property
    def chunk_bytes(self) -> int:
        """Keys and values of one chunk in all full-attention layers."""
        return self.cache.cold.unit_bytes

    def resident_bytes(self) -> ResidentBytes:
        """Summed over sequences; the unfinished chunk counts."""
        empty = int((self.cache.table.kept == PAD).sum())
        return ResidentBytes(
            tensors=self.cache.resident_bytes(),
            served=self.cache.resident_bytes() - empty * self.chunk_bytes,
            keys=self.cache.total * self.cache.batch * len(self.layers) * self.info.key_width * torch.half.itemsize,
        )

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._mask = None
        mask = kwargs.get("attention_mask")
        if kwargs.get("past_key_values") is self.cache and mask is not None and not bool(mask.all()):
            raise InputError(
                "a padded batch: chunks are counted from the first token of every sequence; "
                "give sequences of equal length without padding, or one at a time"
            )

    def _hide_padding(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Where sequences keep different numbers of chunks, hide the rows in front that stand for none."""
        if kwargs.get("past_key_values") is not self.cache or not self.cache.table.padded():
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._mask is None:  # the first full-attention layer of this forward: the others hold the same rows
            self._mask = self._visible(self.cache.layers[module.layer_idx].rows, hidden)
        return args, kwargs | {"attention_mask": self._mask.to(hidden.device)}

    def _visible(self, rows: int, hidden: torch.Tensor) -> torch.Tensor:
        """The mask [B, 1, S, rows + S] of S new tokens behind `rows` resident ones, as the model's attention takes it.

        Raises InputError for an attention that takes none.
        """
        implementation = self.model.config.get_text_config(decoder=True)._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise InputError(
                f"sequences that keep different numbers of chunks need a mask, which attention `{implementation}` has "
                "not: load the model with attn_implementation='sdpa', serve a budget, or one sequence at a time"
            )
        new = hidden.shape[1]
        causal = torch.ones(new, rows + new, dtype=torch.bool, device=hidden.device).tril(rows)
        empty = (self.cache.table.kept == PAD).to(hidden.device).repeat_interleave(self.cache.chunk_tokens, dim=1)
        empty = nn.functional.pad(empty, (0, rows + new - empty.shape[1]))
        mask = (causal & ~empty[:, None])[:, None]
        if implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
