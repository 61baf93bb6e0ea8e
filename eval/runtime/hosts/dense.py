"""A Hugging Face decoder with ordinary attention as host; sliding-window layers are left as they are."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.observe import AttentionCall, observe
from data_gen.core.errors import InputError
from data_gen.core.keys import KeyPooler, flatten_heads
from eval.runtime.correction import Correction
from eval.runtime.hosts.base import Host, ResidentBytes, rope_follows_length
from eval.runtime.hosts.corrector import Corrector, Rows
from eval.runtime.hosts.resident import PAD, Move, Prepared, ResidentChunks

PIECE_TOKENS = 4096
"""Tokens of a sequence read at once: their mask over 131,072 earlier ones takes half a GiB, in torch's bool."""

TILE = 64
"""Chunks that go to the cold side at once."""

ROOM = 64
"""Rows for tokens to come: a layer is copied once in so many, not with every token."""


class ResidentLayer(DynamicLayer):
    """One full-attention layer. keys, values: [B, KV, rows, d], the kept chunks, then all tokens read since.

    What is not resident takes no part in attention and no memory beside the model. New tokens are written behind the
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
            self.layers[layer] = ResidentLayer()
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
            self.pooled[call.layer].append(call.new_keys())
            self.newest[call.layer] = call.hidden[:, -1].to(torch.bfloat16, copy=True)

    def chunk_keys(self, layers: Sequence[int]) -> torch.Tensor:
        """Chunk keys of observed layers as traces store them: [B, N, layers, KV * d] fp16."""
        return torch.stack([flatten_heads(self._pooled(layer)).half().to(self.device) for layer in layers], dim=2)

    def _pooled(self, layer: int) -> torch.Tensor:
        return cast(torch.Tensor, self.pooled[layer].pooled)  # of a cache that has read something

    def stage(self) -> None:
        """Copy the chunks completed since the last time to the cold side: a unit is a chunk in all layers."""
        size, behind = self.chunk_tokens, self.table.kept.shape[1] - self.table.fresh
        while (first := self.cold.count) < self.total:
            last = min(first + TILE, self.total)
            columns = slice((first + behind) * size, (last + behind) * size)
            parts = [
                _by_chunk(getattr(layer, side)[:, :, columns], size).transpose(1, 2).flatten(2).to(self.device)
                for layer in self.full
                for side in ("keys", "values")
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
        like = [cast(torch.Tensor, each.keys) for each in self.full]
        shapes = [(keys.shape[1], self.chunk_tokens, keys.shape[3]) for keys in like]
        first, size = 2 * sum(map(prod, shapes[:place])), 2 * prod(shapes[place])
        units = torch.stack([self.cold.pools[0][chunk][first : first + size] for chunk in chunks])
        keys, values = units.to(like[place].device).unflatten(1, (2, *shapes[place])).unbind(dim=1)
        return keys, values

    def _rewrite(self, move: Move, fetched: torch.Tensor | None) -> None:
        """Beside the unfinished chunk, which stays. fetched: [n, keys and values of all layers], or None."""
        width = self.table.rows(self.total)
        first = 0
        for layer in self.full:
            layer.leave_room()  # or it would hold the old rows until the next token
            for name in ("keys", "values"):
                held = getattr(layer, name)
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
                setattr(layer, name, torch.cat([rows.flatten(2, 3), unfinished], dim=2))

    def resident_bytes(self) -> int:
        """Bytes of resident keys and values of the full-attention layers and their correction, as they lie."""
        held = 0 if self.corrector is None else self.corrector.held_bytes()
        return held + sum(2 * layer.keys.nbytes for layer in self.full if layer.keys is not None)

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


class DenseHost(Host):
    """A model and one batch of sequences that it decodes (see `Host`).

    layers: transformer layers that the memory indexer reads; pageable: as ColdPool's; correction: per-step, of one
    sequence. Raises InputError when a layer has no full attention.
    """

    cache: ResidentCache

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_tokens: int,
        layers: Sequence[int],
        pageable: bool | None = None,
        correction: Correction | None = None,
    ) -> None:
        backbone = DenseBackbone(model)
        if unknown := sorted(set(layers) - set(backbone.info.full_layers)):
            raise InputError(
                f"the indexer reads layers {unknown}, full attention has the model in {backbone.info.full_layers} only"
            )
        self.model, self.info, self.modules = model, backbone.info, backbone.modules
        self.layers, self.one_thread = list(layers), rope_follows_length(model)
        self.cache: ResidentCache = ResidentCache(
            model.config, backbone.info.full_layers, chunk_tokens, layers, pageable, correction
        )
        self._mask: torch.Tensor | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """They note what the newest token asks, and hide empty rows.

        Reading a padded batch into it raises InputError: chunks are counted from the first token of every sequence.
        """
        with ExitStack() as stack:
            stack.enter_context(observe(self.model, self.cache.remember, self.cache, self.cache.extend))
            enters = self.model.get_decoder().register_forward_pre_hook(self._enters, with_kwargs=True)
            stack.callback(enters.remove)
            for module in self.modules.values():
                stack.callback(module.register_forward_pre_hook(self._hide_padding, with_kwargs=True).remove)
            yield

    def piece(self, sequences: int) -> int:
        corrector = self.cache.corrector
        return 1 if corrector is not None and corrector.active else PIECE_TOKENS

    def keys(self) -> torch.Tensor:
        """Mean keys of all complete chunks, as a trace holds them: [B, N, layers, KV * d] fp16."""
        return self.cache.chunk_keys(self.layers).to(self.model.device)

    def resident_bytes(self) -> ResidentBytes:
        """Summed over sequences; the unfinished chunk counts."""
        empty = int((self.cache.table.kept == PAD).sum())
        return ResidentBytes(
            tensors=self.cache.resident_bytes(),
            served=self.cache.resident_bytes() - empty * self.chunk_bytes,
            keys=self.cache.total * self.cache.batch * len(self.layers) * self.info.key_width * torch.half.itemsize,
            means=0 if self.cache.corrector is None else self.cache.corrector.mean_bytes(),
        )

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is None or kwargs.get("past_key_values") is not self.cache:
            return
        self._mask = None
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
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
