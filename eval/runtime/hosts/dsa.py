"""A Hugging Face decoder with DeepSeek sparse attention (DSA) as host: its indexers pick among resident tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_gen.backbones.dsa import DsaBackbone, piece_tokens
from data_gen.backbones.dsa_hooks import IndexCall, indexers, observe_indexers
from data_gen.backbones.observe import AttentionCall
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dense_cache import ResidentCache


class DsaCache(ResidentCache):
    """Chunk keys are index keys before RoPE. calls: layer -> the newest call of its indexer, while somebody reads."""

    calls: dict[int, IndexCall]

    def read_keys(self, call: AttentionCall) -> torch.Tensor:
        return self.calls[call.layer].content[:, None]

    def asked(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the newest token of the first sequence has just asked of a layer's indexer: query [1, H, d] behind RoPE,
        weights [1, H]."""
        call, held = self.calls[layer], self.full[self.full_layers.index(layer)].sides["indexer_keys"]
        query = call.turned(held[:, 0, -call.content.shape[1] :])
        return query[0, -1:], call.weights[0, -1:]

    def index_entries(self, sequence: int) -> torch.Tensor:
        """Keys of the backbone's own indexers behind RoPE, from the cold side: [N, layers, tokens, d] on the CPU."""
        self.stage()
        sides = [(name, held) for layer in self.full for name, held in layer.sides.items()]
        sizes = [held.shape[1] * self.chunk_tokens * held.shape[3] for _, held in sides]
        units = self.cold.units(sequence) if self.total else torch.empty(0, sum(sizes))
        keys = [
            part for (name, _), part in zip(sides, units.split(sizes, dim=1), strict=True) if name == "indexer_keys"
        ]
        return torch.stack(keys, dim=1).unflatten(2, (self.chunk_tokens, -1))


class DsaHost(DenseHost):
    """A model and one batch of sequences that it decodes (see `Host`).

    Kept and fetched is what the model caches of a chunk: latents, the parts of keys that turn, and index keys. Raises
    InputError for a correction: there are no keys of heads to average.
    """

    cache: DsaCache
    family = DsaBackbone
    holds = DsaCache

    @contextmanager
    def hooks(self) -> Iterator[None]:
        own = indexers(self.model)
        watched = {layer: own[layer] for layer in self.cache.observed}
        with observe_indexers(self.model, watched) as self.cache.calls, super().hooks():
            yield

    def picked(self, layer: int, rows: int) -> torch.Tensor:
        """A layer without an indexer takes the picks of the one before."""
        picks = self.cache.calls[max(own for own in self.cache.calls if own <= layer)].picks[0, -1].long()
        return torch.zeros(1, rows, dtype=torch.bool, device=picks.device).index_fill(1, picks, True)

    def piece(self, sequences: int) -> int:
        return piece_tokens(self.model, self.position + 1, sequences)
