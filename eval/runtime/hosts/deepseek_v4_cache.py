"""A DeepSeek-V4 cache that holds every compressed entry cold, in host memory, and shows the model the resident ones."""

import copy
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from data_gen.backbones.deepseek_v4_hooks import CSA
from data_gen.core.key_bytes import encode_keys, hadamard
from eval.runtime.hosts.moving import MovingChunks
from eval.runtime.hosts.resident import Move

NAMES = ("compressor", "indexer")
"""What a chunk is made of in each CSA layer: its attention entry, then its native index key."""
TILE = 1024
"""Chunks that go to the cold side at once."""


class ResidentCsaCache(MovingChunks, DynamicCache):
    """The stock cache, whose CSA layers hold the entries of the resident chunks alone; one table for all layers.

    Stock CSA layers append what they make to what they hold and count apart from it, so that fewer entries, in the
    order of chunks, are all that eviction takes. New chunks are resident until the next `keep`; then they go cold.

    observed: ordinals of the CSA layers that the memory indexer reads; newest: what the newest token of each sequence
    brought into them, by ordinal: [B, hidden]; pageable: as ColdPool's.
    """

    def __init__(self, config: PreTrainedConfig, observed: Sequence[int] = (), pageable: bool | None = None) -> None:
        super().__init__(config=config)
        self.pageable = pageable
        self.csa = [layer for layer, kind in enumerate(config.layer_types) if kind == CSA]
        self.observed = list(observed)
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.newest: dict[int, torch.Tensor] = {}
        self._keys: list[torch.Tensor] = []

    @property
    def _csa_layers(self) -> list[DeepseekV4CSACache]:
        return [self.layers[layer] for layer in self.csa]

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
            held = self._csa_layers[0].compressed_kv["compressor"].shape[1]
            rows = slice(held - self.total + first, held - self.total + min(first + TILE, self.total))
            units = torch.stack(
                [
                    torch.cat([layer.compressed_kv[name][:, rows].to(self.device) for name in NAMES], dim=-1)
                    for layer in self._csa_layers
                ],
                dim=2,
            )
            self.cold.append(units)
            width = self._csa_layers[0].compressed_kv["indexer"].shape[-1]
            self._keys.append(encode_keys(hadamard(units[:, :, self.observed, -width:])))

    def keys(self) -> torch.Tensor:
        """Keys of all chunks as a trace holds them: [B, N, observed, d + 4] uint8 beside the model."""
        self.stage()
        self._keys = [torch.cat(self._keys, dim=1)]
        return self._keys[0]

    def index_entries(self, sequence: int) -> torch.Tensor:
        """Keys of the backbone's own indexers, from the cold side: [N, CSA layers, d] on the CPU."""
        self.stage()
        width = self._csa_layers[0].compressed_kv["indexer"].shape[-1]
        return self.cold.units(sequence)[..., -width:]

    def _rewrite(self, move: Move, fetched: torch.Tensor | None) -> None:
        """fetched: [n, CSA layers, entry and key], or None."""
        for ordinal, layer in enumerate(self._csa_layers):
            first = 0
            for name in NAMES:
                hot = layer.compressed_kv[name]
                rows = hot.new_zeros(*move.shape, hot.shape[-1])
                rows[_on(hot, move.stay_to)] = hot[_on(hot, move.stay)]
                if fetched is not None:
                    part = fetched[:, ordinal, first : first + hot.shape[-1]]
                    rows[_on(hot, move.fetch_to)] = part.to(hot.device)
                layer.compressed_kv[name] = rows
                first += hot.shape[-1]

    def resident_bytes(self) -> int:
        """Bytes of the resident entries and native index keys of all CSA layers, as they lie."""
        held = [hot for layer in self._csa_layers for hot in layer.compressed_kv.values() if hot is not None]
        return sum(hot.numel() * hot.element_size() for hot in held)

    def fork(self) -> "ResidentCsaCache":
        """An independent continuation of the same history; tensors are shared until either side goes on."""
        self.stage()
        twin = copy.copy(self)
        twin.table, twin.cold, twin.newest = copy.copy(self.table), self.cold.fork(), dict(self.newest)
        twin._keys = list(self._keys)
        twin.layers = [_fork_layer(layer) for layer in self.layers]
        return twin

    def crop(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("compressed entries cannot be taken back: no assisted or speculative decoding")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._keys = [keys[beam_idx.to(keys.device)] for keys in self._keys]
        self.newest = {ordinal: state[beam_idx.to(state.device)] for ordinal, state in self.newest.items()}


def _fork_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Stock layers replace their tensors and never write into them, so that new dicts around the same ones do."""
    twin = copy.copy(layer)
    for name, state in vars(layer).items():
        if isinstance(state, dict):
            setattr(twin, name, dict(state))
    return twin


def _on(like: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].to(like.device), pair[1].to(like.device)
