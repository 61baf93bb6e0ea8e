"""The cache of a decoder's host: full-attention layers that hold the resident chunks alone, whatever they cache."""

import copy
from collections.abc import Sequence
from math import prod
from typing import Self, cast

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

from data_gen.backbones.observe import AttentionCall
from data_gen.core.errors import InputError
from data_gen.core.keys import KeyPooler, flatten_heads
from eval.runtime.correction import Correction
from eval.runtime.hosts.corrector import Corrector, Rows
from eval.runtime.hosts.resident import Move, Prepared, ResidentChunks

TILE = 64
"""Chunks that go to the cold side at once."""

ROOM = 64
"""Rows for tokens to come: a layer is copied once in so many, not with every token."""


class ResidentLayer(DynamicLayer):
    """One full-attention layer. keys, values: [B, KV, rows, d], the kept chunks, then all tokens read since; with MLA
    the latent and the part of the key that turns with the position, of one head each.

    What is not resident takes no part in attention and no memory beside the model. New tokens are written after the
    others where the memory has room, which only one of those that share it may do: `leave_room` gives that up.
    """

    _layer_type = None  # or it would replace the stock class in every cache of the process

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.leave_room()

    def leave_room(self) -> None:
        """Let the next tokens go to memory of their own."""
        self._roomy: dict[str, torch.Tensor] = {}

    def move_into(self, memory: dict[str, torch.Tensor]) -> None:
        """Go on in other memory, that of each side, which has room behind the rows."""
        for name, held in self.sides.items():
            memory[name][:, :, : held.shape[2]] = held
            self.hold(name, memory[name][:, :, : held.shape[2]])
        self._roomy = dict(memory)

    def see(self, rows: int) -> None:
        """What others wrote into its memory is its own as well, up to `rows` of each side."""
        for name, roomy in self._roomy.items():
            self.hold(name, roomy[:, :, :rows])

    @property
    def sides(self) -> dict[str, torch.Tensor]:
        """What it holds of each token: name -> [B, heads, rows, width], the memory itself."""
        return {} if self.keys is None else {"keys": self.keys, "values": cast(torch.Tensor, self.values)}

    def hold(self, name: str, states: torch.Tensor) -> None:
        """Make these the rows of a side."""
        setattr(self, name, states)

    @property
    def rows(self) -> int:
        """Resident tokens of a sequence, those that stand for no chunk included."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first = not self.is_initialized
        self.length += key_states.shape[-2]
        if first:
            return super().update(key_states, value_states)
        self.keys, self.values = self._append("keys", key_states), self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, states: torch.Tensor) -> torch.Tensor:
        held, roomy = getattr(self, name), self._roomy.get(name)
        rows, new = held.shape[2], states.shape[2]
        # The memory is the layer's own while what it holds still begins there; a new set has moved it elsewhere.
        if roomy is None or roomy.data_ptr() != held.data_ptr() or roomy.shape[2] < rows + new:
            roomy = self._roomy[name] = held.new_empty(*held.shape[:2], rows + new + ROOM, held.shape[3])
            roomy[:, :, :rows] = held
        roomy[:, :, rows : rows + new] = states
        return roomy[:, :, : rows + new]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All resident tokens lie before the new ones, so the mask is that of a shorter history."""
        return self.rows + query_length, self.length - self.rows

    def reset(self) -> None:
        super().reset()
        self.length = 0
        self.leave_room()


class ResidentIndexedLayer(ResidentLayer, DynamicIndexedLayer):
    """A layer whose attention an indexer picks tokens for: the index keys of evicted tokens go with them, so that it
    picks among resident ones."""

    _layer_type = None

    @property
    def sides(self) -> dict[str, torch.Tensor]:
        keys = self.indexer_keys  # None in layers that take the picks of an earlier one
        return super().sides | ({} if keys is None else {"indexer_keys": keys[:, None]})

    def hold(self, name: str, states: torch.Tensor) -> None:
        super().hold(name, states[:, 0] if name == "indexer_keys" else states)


class ResidentCache(ResidentChunks):
    """A ResidentLayer for every full-attention layer, one resident set for all; sliding-window layers stay stock.

    Chunks are of `chunk_tokens` tokens; a token of an unfinished one is always resident. observed: layers whose chunk
    keys and newest hidden state are kept, as `remember` is told; pooled: layer -> chunk keys of all sequences so far,
    [B, KV, N, d]; pageable: as ColdPool's; corrector: of the per-step correction, None without.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        full_layers: Sequence[int],
        chunk_tokens: int,
        observed: Sequence[int] = (),
        pageable: bool | None = None,
        correction: Correction | None = None,
    ) -> None:
        super().__init__(config=config)
        for layer in full_layers:
            indexed = isinstance(self.layers[layer], DynamicIndexedLayer)
            self.layers[layer] = ResidentIndexedLayer() if indexed else ResidentLayer()
        self.full_layers, self.chunk_tokens, self.observed = list(full_layers), chunk_tokens, list(observed)
        self.pageable, self.correction = pageable, correction
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.pooled = {layer: KeyPooler(self.chunk_tokens) for layer in self.observed}
        self.correct(self.correction, {})

    def correct(self, correction: Correction | None, queries: dict[int, torch.Tensor]) -> None:
        """From the next `keep` on. queries: layer -> the newest token's, [H, 1, d] after RoPE, where one was read."""
        self.correction = correction
        self.corrector = None if correction is None else Corrector(correction, queries)

    @property
    def full(self) -> list[ResidentLayer]:
        """The full-attention layers, in order."""
        return [cast(ResidentLayer, self.layers[layer]) for layer in self.full_layers]

    @property
    def total(self) -> int:
        """Complete chunks of each sequence."""
        return self.full[0].length // self.chunk_tokens

    @property
    def batch(self) -> int:
        """Sequences read, 0 before any."""
        keys = self.full[0].keys
        return 0 if keys is None else len(keys)

    @property
    def device(self) -> torch.device:
        return self.full[0].device

    def remember(self, call: AttentionCall) -> None:
        """Note what an observed layer was asked, and the keys of the new tokens."""
        if call.layer in self.pooled:
            self.pooled[call.layer].append(self.read_keys(call))
            self.newest[call.layer] = call.hidden[:, -1].to(torch.bfloat16, copy=True)

    def read_keys(self, call: AttentionCall) -> torch.Tensor:
        """Keys of the new tokens as traces pool them, [B, KV, S, d]."""
        return call.new_keys()

    def chunk_keys(self, layers: Sequence[int]) -> torch.Tensor:
        """Chunk keys of observed layers as traces store them: [B, N, layers, KV * d] fp16."""
        return torch.stack([flatten_heads(self._pooled(layer)).half().to(self.device) for layer in layers], dim=2)

    def _pooled(self, layer: int) -> torch.Tensor:
        return cast(torch.Tensor, self.pooled[layer].pooled)  # of a cache that has read something

    def stage(self) -> None:
        """Copy the chunks completed since the last time to the cold side: a unit is a chunk in all layers."""
        # Chunks made since the set was fixed follow the kept rows: `fresh`, the first, is right behind them.
        size, behind = self.chunk_tokens, self.table.kept.shape[1] - self.table.fresh
        while (first := self.cold.count) < self.total:
            last = min(first + TILE, self.total)
            columns = slice((first + behind) * size, (last + behind) * size)
            parts = [
                _by_chunk(held[:, :, columns], size).transpose(1, 2).flatten(2).to(self.device)
                for layer in self.full
                for held in layer.sides.values()
            ]
            self.cold.append(torch.cat(parts, dim=-1))

    def keep(self, resident: Sequence[torch.Tensor] | Prepared) -> Move:
        if self.corrector is not None and self.batch > 1:
            raise InputError(f"{self.batch} sequences at once: the per-step correction serves one; give one at a time")
        move = super().keep(resident)
        if self.corrector is not None:
            if self.cold.pools and self.cold.pools[0].pinned:
                torch.cuda.current_stream().synchronize()  # copies into pinned memory may be under way
            self.corrector.refresh(self.resident()[0], self.total, self.full_layers, self._cold_rows)
        return move

    def extend(self, layer: int, sequence: int, query: torch.Tensor, scaling: float) -> Rows | None:
        """What the per-step correction adds to the resident rows of a layer, as `observe` takes it."""
        if self.corrector is None or len(query) > 1:
            return None
        rows = self.corrector.rows(layer, query[0], scaling, self._cold_rows)
        return None if rows is None else (_in_line(rows[0]), _in_line(rows[1]))

    def _cold_rows(self, layer: int, chunks: list[int]) -> Rows:
        """Keys and values of chunks of the only sequence, from the cold side, [n, KV, tokens, d] each."""
        place = self.full_layers.index(layer)
        shapes = [
            [(held.shape[1], self.chunk_tokens, held.shape[3]) for held in each.sides.values()]
            for each in self.full[: place + 1]
        ]
        # A unit is one chunk in all layers, one after the other: skip what the layers before take of it.
        first, sizes = sum(prod(shape) for sides in shapes[:-1] for shape in sides), [*map(prod, shapes[-1])]
        units = torch.stack([self.cold.pools[0][chunk][first : first + sum(sizes)] for chunk in chunks])
        keys, values = units.to(self.full[place].device).split(sizes, dim=1)
        return keys.unflatten(1, shapes[-1][0]), values.unflatten(1, shapes[-1][1])

    def _rewrite(self, move: Move, fetched: torch.Tensor | None) -> None:
        """Beside the unfinished chunk, which stays. fetched: [n, keys and values of all layers], or None."""
        width = self.table.rows(self.total)
        first = 0
        for layer in self.full:
            layer.leave_room()  # or it would hold the old rows until the next token
            for name, held in layer.sides.items():
                heads, _, head = held.shape[1:]
                chunks = _by_chunk(held[:, :, : width * self.chunk_tokens], self.chunk_tokens)
                rows = held.new_zeros(move.shape[0], heads, move.shape[1], self.chunk_tokens, head)
                _put(rows, move.stay_to, chunks[move.stay[0].to(held.device), :, move.stay[1].to(held.device)])
                size = heads * self.chunk_tokens * head
                if fetched is not None:
                    part = fetched[:, first : first + size].unflatten(1, (heads, self.chunk_tokens, head))
                    _put(rows, move.fetch_to, part.to(held.device))
                first += size
                unfinished = held[:, :, width * self.chunk_tokens :]
                layer.hold(name, torch.cat([rows.flatten(2, 3), unfinished], dim=2))

    def resident_bytes(self) -> int:
        """Bytes of resident keys and values of the full-attention layers and their correction, as they are stored."""
        held = 0 if self.corrector is None else self.corrector.held_bytes()
        return held + sum(side.nbytes for layer in self.full for side in layer.sides.values())

    def fork(self) -> Self:
        twin = super().fork()
        twin.layers = [copy.copy(layer) for layer in self.layers]
        for layer in (*self.full, *twin.full):
            layer.leave_room()
        twin.pooled = {layer: copy.copy(pooler) for layer, pooler in self.pooled.items()}
        twin.corrector = None if self.corrector is None else self.corrector.fork()
        return twin

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for pooler in self.pooled.values():
            pooler.reorder(beam_idx)


def _by_chunk(states: torch.Tensor, size: int) -> torch.Tensor:
    """[B, KV, n * size, d] -> [B, KV, n, size, d]."""
    return states.unflatten(2, (states.shape[2] // size, size))


def _in_line(chunks: torch.Tensor) -> torch.Tensor:
    """[n, KV, size, d] -> [1, KV, n * size, d]."""
    return chunks.transpose(0, 1).flatten(1, 2)[None]


def _put(rows: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor], chunks: torch.Tensor) -> None:
    """Chunks [n, KV, size, d] to (sequence, row) pairs of rows [B, KV, R, size, d]."""
    rows[where[0].to(rows.device), :, where[1].to(rows.device)] = chunks
