"""A Hugging Face DeepSeek-V4 as host: a cache that holds every compressed entry cold and shows the model the resident
ones, masks that keep the stock modules causal over fewer rows, and what the memory indexer reads.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone, piece_tokens
from data_gen.backbones.deepseek_v4_hooks import CSA, arguments, csa_attention, csa_layers
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE, SCALE_BYTES, encode_keys, hadamard
from eval.runtime.hosts.base import Host, ResidentBytes, rope_follows_length
from eval.runtime.hosts.resident import PAD, Move, ResidentChunks
from eval.serving.entries import EntryShape
from eval.serving.level1 import PagedKeys

NAMES = ("compressor", "indexer")
"""What a chunk is made of in each CSA layer: its attention entry, then its native index key."""
TILE = 1024
"""Chunks that go to the cold side at once."""


class KeyPages:
    """Keys of a growing history in pages of 64 chunks: new ones are written after the others, which stay in place.

    pages: [B, W, L, 64 (d + 4)] uint8 (data_gen/core/key_bytes.py), W a power of two: the Triton backend keeps buffers
    for every width of the page table that it is given. chunks: of each sequence so far.
    """

    def __init__(self) -> None:
        self.pages = torch.empty(0, 0, 0, 0, dtype=torch.uint8)
        self.chunks = 0
        self._shared = False

    def append(self, rows: torch.Tensor) -> None:
        """rows: [B, n, L, d + 4] uint8."""
        batch, new, layers, stored = rows.shape
        needed, held = -(-(self.chunks + new) // PAGE), self.pages.shape[1]
        if self._shared or needed > held or not held:  # memory that a fork reads too is not written into
            wide = max(held, 1 << (max(1, needed) - 1).bit_length())
            pages = rows.new_zeros(batch, wide, layers, PAGE * stored)
            if held:
                pages[:, :held] = self.pages
            self.pages, self._shared = pages, False
        place = torch.arange(self.chunks, self.chunks + new, device=rows.device)
        for part, now in zip(self._parts(), rows.split([stored - SCALE_BYTES, SCALE_BYTES], dim=-1), strict=True):
            part[:, place // PAGE, place % PAGE] = now
        self.chunks += new

    def rows(self) -> torch.Tensor:
        """As a trace holds them: [B, N, L, d + 4] uint8."""
        return torch.cat([part.flatten(1, 2)[:, : self.chunks] for part in self._parts()], dim=-1)

    def paged(self) -> PagedKeys:
        """As Level 1 scores them: the memory itself, until more is appended."""
        batch, wide = self.pages.shape[:2]
        table = torch.arange(batch * wide, dtype=torch.int32, device=self.pages.device)
        return PagedKeys(self.pages.flatten(0, 1), table.view(batch, wide))

    def fork(self) -> "KeyPages":
        """The same memory until either side continues."""
        self._shared = True
        return copy.copy(self)

    def reorder(self, sequences: torch.Tensor) -> None:
        """Sequence i becomes what sequences[i] was."""
        if self.chunks:
            self.pages, self._shared = self.pages[sequences.to(self.pages.device)], False

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A page is 64 keys' values, then their 64 scales: [B, W, 64, L, d] and [B, W, 64, L, 4], the memory itself."""
        width = self.pages.shape[-1] // PAGE - SCALE_BYTES
        values, scales = self.pages.split([PAGE * width, PAGE * SCALE_BYTES], dim=-1)
        return values.unflatten(-1, (PAGE, width)).transpose(2, 3), scales.unflatten(-1, (PAGE, -1)).transpose(2, 3)


class ResidentCsaCache(ResidentChunks):
    """The stock cache, whose CSA layers hold the entries of the resident chunks alone; one table for all layers.

    Stock CSA layers append what they make to what they hold and count apart from it, so that fewer entries, in the
    order of chunks, are all that eviction takes. observed: ordinals of the CSA layers that the memory indexer reads, by
    which `newest` goes; keys: of all chunks in these layers, as Level 1 scores them; pageable: as ColdPool's.
    """

    def __init__(self, config: PreTrainedConfig, observed: Sequence[int] = (), pageable: bool | None = None) -> None:
        super().__init__(config=config)
        self.pageable = pageable
        self.csa = [layer for layer, kind in enumerate(config.layer_types) if kind == CSA]
        self.observed = list(observed)
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._keys = KeyPages()

    @property
    def _csa_layers(self) -> list[DeepseekV4CSACache]:
        return [cast(DeepseekV4CSACache, self.layers[layer]) for layer in self.csa]

    @property
    def total(self) -> int:
        """Chunks made so far."""
        return self._csa_layers[0].entry_count["compressor"]

    @property
    def batch(self) -> int:
        """Sequences read, 0 before any."""
        hot = self._csa_layers[0].compressed_kv["compressor"]
        return 0 if hot is None else len(hot)

    @property
    def device(self) -> torch.device:
        return self._csa_layers[0].device

    def stage(self) -> None:
        """Copy the chunks made since the last time to the cold side, and encode their keys."""
        while (first := self.cold.count) < self.total or not self.cold.pools:  # no chunks yet: pools all the same
            # Evicted chunks have left their rows, and new ones are appended: the last row is chunk total - 1.
            held = _hot(self._csa_layers[0], "compressor").shape[1]
            rows = slice(held - self.total + first, held - self.total + min(first + TILE, self.total))
            units = torch.stack(
                [
                    torch.cat([_hot(layer, name)[:, rows].to(self.device) for name in NAMES], dim=-1)
                    for layer in self._csa_layers
                ],
                dim=2,
            )
            self.cold.append(units)
            width = _hot(self._csa_layers[0], "indexer").shape[-1]
            if self.observed:
                self._keys.append(encode_keys(hadamard(units[:, :, self.observed, -width:])))

    def key_pages(self) -> "KeyPages":
        """Keys of all chunks so far in the observed layers, beside the model."""
        self.stage()
        return self._keys

    def index_entries(self, sequence: int) -> torch.Tensor:
        """Keys of the backbone's own indexers, from the cold side: [N, CSA layers, 1, d] on the CPU."""
        self.stage()
        width = _hot(self._csa_layers[0], "indexer").shape[-1]
        return self.cold.units(sequence)[..., None, -width:]

    def _rewrite(self, move: Move, fetched: torch.Tensor | None) -> None:
        """fetched: [n, CSA layers, entry and key], or None."""
        for ordinal, layer in enumerate(self._csa_layers):
            first = 0
            for name in NAMES:
                hot = _hot(layer, name)
                rows = hot.new_zeros(*move.shape, hot.shape[-1])
                rows[_on(hot, move.stay_to)] = hot[_on(hot, move.stay)]
                if fetched is not None:
                    part = fetched[:, ordinal, first : first + hot.shape[-1]]
                    rows[_on(hot, move.fetch_to)] = part.to(hot.device)
                layer.compressed_kv[name] = rows
                first += hot.shape[-1]

    def resident_bytes(self) -> int:
        """Bytes of the resident entries and native index keys of all CSA layers, as they are stored."""
        held = [hot for layer in self._csa_layers for hot in layer.compressed_kv.values() if hot is not None]
        return sum(hot.numel() * hot.element_size() for hot in held)

    def fork(self) -> Self:
        twin = super().fork()
        twin.layers = [_fork_layer(layer) for layer in self.layers]
        twin._keys = self._keys.fork()
        return twin

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._keys.reorder(beam_idx)


def _hot(layer: DeepseekV4CSACache, name: str) -> torch.Tensor:
    """What a CSA layer that has read something holds of `name`: [B, rows, width]."""
    return cast(torch.Tensor, layer.compressed_kv[name])


def _fork_layer(layer: Any) -> Any:
    """Stock layers replace their tensors and never write into them, so that new dicts around the same ones do."""
    twin = copy.copy(layer)
    for name, state in vars(layer).items():
        if isinstance(state, dict):
            setattr(twin, name, dict(state))
    return twin


def _on(like: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].to(like.device), pair[1].to(like.device)


@contextmanager
def resident_masks(model: PreTrainedModel) -> Iterator[None]:
    """Mask `model`'s CSA layers by chunk while the context is open, wherever they read a ResidentCsaCache.

    The stock modules take row r for chunk r, in every sequence. One new token sees every resident chunk, so the stock
    masks are right as they are; with several new tokens, or with sequences that keep different numbers of chunks, hooks
    hide the rows that a token must not see. Reading a padded batch into such a cache raises InputError: the stock model
    compresses padding with the text.
    """
    decoder = model.get_decoder()
    with ExitStack() as hooks:
        hooks.callback(decoder.register_forward_pre_hook(_refuse_padding, with_kwargs=True).remove)
        for layer in csa_layers(model):
            for handle in _RowMask(csa_attention(model, layer).compressor.indexer).attach():
                hooks.callback(handle.remove)
        yield


class _RowMask(threading.local):
    """Hides rows from one native indexer. hidden: [B, S, rows] of the call at work in this thread, None when stock
    masks do."""

    hidden: torch.Tensor | None = None

    def __init__(self, indexer: Any) -> None:
        self.indexer = indexer

    def attach(self) -> list[Any]:
        return [
            self.indexer.register_forward_pre_hook(self._enters, with_kwargs=True),
            self.indexer.scorer.register_forward_hook(self._scored),
            self.indexer.register_forward_hook(self._picked),
        ]

    def _enters(self, module: Any, args: tuple, kwargs: dict | None = None) -> None:
        self.hidden = None
        if kwargs is None:  # another host of the model is being attached or detached in another thread
            return
        given = arguments(module, args, kwargs)
        cache, positions, batch = given["past_key_values"], given["position_ids"], len(given["hidden_states"])
        if not isinstance(cache, ResidentCsaCache) or not cache.table.evicted():
            return
        if positions.shape[1] == 1 and not cache.table.padded():
            return
        chunks = cache.table.chunks(cache.total, batch).to(positions.device)[:, None]
        # A chunk is made with its last token: that one sees it, those before it must not.
        made = (positions + 1) // module.compress_rate
        self.hidden = (chunks == PAD) | (chunks >= made[..., None])

    def _scored(self, module: nn.Module, args: tuple, scores: torch.Tensor) -> torch.Tensor | None:
        return None if self.hidden is None else scores.masked_fill(self.hidden, -torch.inf)

    def _picked(self, module: nn.Module, args: tuple, picks: torch.Tensor) -> torch.Tensor | None:
        """Hidden rows are picked only where too few others are left: no picks, then."""
        if self.hidden is None or not picks.shape[-1]:
            return None
        return picks.masked_fill(self.hidden.gather(-1, picks.clamp_min(0)), -1)


def _refuse_padding(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
    given = {} if kwargs is None else arguments(module, args, kwargs)
    mask = given.get("attention_mask")
    if isinstance(given.get("past_key_values"), ResidentCsaCache) and mask is not None and not bool(mask.all()):
        raise InputError(
            "a padded batch: DeepSeek-V4 compresses padding together with the text; "
            "give sequences of equal length without padding, or one at a time"
        )


class DeepseekV4Host(Host):
    """A model and one batch of sequences that it decodes (see `Host`).

    layers: CSA ordinals that the memory indexer reads; pageable: as ColdPool's. Raises InputError when the model lacks
    one of the layers.
    """

    cache: ResidentCsaCache

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], pageable: bool | None = None) -> None:
        backbone = DeepseekV4Backbone(model)
        if unknown := sorted(set(layers) - set(backbone.info.full_layers)):
            raise InputError(f"the indexer reads CSA layers {unknown}, the model has {len(backbone.layers)} (from 0)")
        self.model, self.info, self.chunk_tokens = model, backbone.info, backbone.chunk_tokens
        self.layers, self.one_thread = list(layers), rope_follows_length(model)
        self.cache = ResidentCsaCache(model.config, layers, pageable)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """They mask evicted chunks and note what the newest token asks."""
        with resident_masks(self.model), ExitStack() as stack:
            for ordinal in self.layers:
                attention = csa_attention(self.model, self.cache.csa[ordinal])
                watch = attention.register_forward_pre_hook(partial(self._remember, ordinal), with_kwargs=True)
                stack.callback(watch.remove)
            yield

    def piece(self, sequences: int) -> int:
        return piece_tokens(self.model, self.position + 1, sequences)

    def keys(self) -> torch.Tensor:
        """Keys of all chunks made so far, as a trace holds them: [B, N, layers, d + 4] uint8."""
        return self.cache.key_pages().rows().to(self.model.device)

    def level1_keys(self) -> PagedKeys:
        keys = self.cache.key_pages().paged()
        return PagedKeys(keys.pages.to(self.model.device), keys.table.to(self.model.device))

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

    def _remember(self, ordinal: int, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        given = {} if kwargs is None else arguments(module, args, kwargs)
        if given.get("past_key_values") is self.cache:  # else another host of the model reads, or somebody without one
            self.cache.newest[ordinal] = given["hidden_states"][:, -1].to(torch.bfloat16, copy=True)
