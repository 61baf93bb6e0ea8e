"""A Hugging Face decoder with ordinary attention as host; sliding-window layers are left as they are."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.layers import caches_latents, decoder_of
from data_gen.backbones.observe import observe
from data_gen.core.errors import InputError
from eval.runtime.correction import NO_KEYS, Correction
from eval.runtime.hosts.base import Host, ResidentBytes, rope_follows_length
from eval.runtime.hosts.dense_cache import ResidentCache
from eval.runtime.hosts.resident import PAD

PIECE_TOKENS = 4096
"""Tokens of a sequence read at once: their mask over 131,072 earlier ones takes half a GiB, in torch's bool."""


class DenseHost(Host):
    """A model and one batch of sequences that it decodes (see `Host`).

    layers: transformer layers that the memory indexer reads; pageable: as ColdPool's; correction: per-step, of one
    sequence. Raises InputError when a layer has no full attention, and for a correction of a model with MLA.

    latent: whether the model caches latents (MLA).
    """

    cache: ResidentCache
    family: type[DenseBackbone] = DenseBackbone
    holds: type[ResidentCache] = ResidentCache

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_tokens: int,
        layers: Sequence[int],
        pageable: bool | None = None,
        correction: Correction | None = None,
    ) -> None:
        backbone = self.family(model)
        if unknown := sorted(set(layers) - set(backbone.info.full_layers)):
            raise InputError(
                f"the indexer reads layers {unknown}, but the model has full attention only in "
                f"{backbone.info.full_layers}; take a bundle that was trained for this model"
            )
        self.model, self.info, self.modules = model, backbone.info, backbone.modules
        self.latent = caches_latents(model)
        if correction is not None and self.latent:
            raise InputError(NO_KEYS)
        self.layers, self.one_thread = list(layers), rope_follows_length(model)
        self.cache = self.holds(model.config, sorted(self.modules), chunk_tokens, layers, pageable, correction)
        self._mask: torch.Tensor | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """They note what the newest token asks, and hide empty rows.

        Reading a padded batch into it raises InputError: chunks are counted from the first token of every sequence.
        """
        with ExitStack() as stack:
            stack.enter_context(observe(self.model, self.cache.remember, self.cache, self.cache.extend))
            enters = decoder_of(self.model).register_forward_pre_hook(self._enters, with_kwargs=True)
            stack.callback(enters.remove)
            for module in self.modules.values():
                stack.callback(module.register_forward_pre_hook(self._hide_padding, with_kwargs=True).remove)
            yield

    def piece(self, sequences: int) -> int:
        corrector = self.cache.corrector
        return 1 if corrector is not None and corrector.active else PIECE_TOKENS

    def picked(self, layer: int, rows: int) -> torch.Tensor | None:
        """[1, rows] bool, what the newest token of the first sequence attends to in a layer; None for all of it."""
        return None

    def keys(self) -> torch.Tensor:
        """Mean keys of all complete chunks, as a trace holds them: [B, N, layers, KV * d] fp16."""
        return self.cache.chunk_keys(self.layers).to(self.model.device)

    def resident_bytes(self) -> ResidentBytes:
        """Summed over sequences; the unfinished chunk counts."""
        empty = int((self.cache.table.kept == PAD).sum())
        return ResidentBytes(
            tensors=self.cache.resident_bytes(),
            served=self.cache.resident_bytes() - empty * self.cold_bytes,
            keys=self.cache.total * self.cache.batch * len(self.layers) * self.info.key_width * torch.half.itemsize,
            means=0 if self.cache.corrector is None else self.cache.corrector.mean_bytes(),
        )

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is None or kwargs.get("past_key_values") is not self.cache:
            return
        self._mask = None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and not bool(mask.all()):  # a dict holds masks that the model made itself
            raise InputError(
                "a padded batch: chunks are counted from the first token of every sequence; "
                "give sequences of equal length without padding, or one at a time"
            )

    def _hide_padding(self, module: Any, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        """Where sequences keep different numbers of chunks, hide the rows in front that stand for none."""
        if kwargs is None or kwargs.get("past_key_values") is not self.cache or not self.cache.table.padded():
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._mask is None:  # the first full-attention layer of this forward: the others hold the same rows
            self._mask = self._visible(self.cache.full[0].rows, hidden)
        return args, kwargs | {"attention_mask": self._mask.to(hidden.device)}

    def _visible(self, rows: int, hidden: torch.Tensor) -> torch.Tensor:
        """The mask [B, 1, S, rows + S] of S new tokens after `rows` resident ones, as the model's attention takes it.

        Raises InputError for an attention that takes none.
        """
        implementation = self.model.config.get_text_config(decoder=True)._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise InputError(
                "sequences that keep different numbers of chunks need a mask, and attention "
                f"`{implementation}` takes none: load the model with attn_implementation='sdpa', serve a budget, or "
                "decode one sequence at a time"
            )
        new = hidden.shape[1]
        causal = torch.ones(new, rows + new, dtype=torch.bool, device=hidden.device).tril(rows)
        empty = (self.cache.table.kept == PAD).to(hidden.device).repeat_interleave(self.cache.chunk_tokens, dim=1)
        empty = nn.functional.pad(empty, (0, rows + new - empty.shape[1]))
        mask = (causal & ~empty[:, None])[:, None]
        if implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
