"""A DeepSeek-V4 cache that holds every compressed entry cold, in host memory, and shows the model the resident ones."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from data_gen.backbones.deepseek_v4_hooks import CSA
from data_gen.errors import InputError
from data_gen.key_codec import encode_keys, hadamard

PAD = -1
"""Stands for no chunk, in front of the chunks of a sequence that has fewer resident ones than its neighbours."""


@dataclass(frozen=True)
class Move:
    """How one resident set becomes another; index pairs (sequence, row or chunk).

    shape: (B, R) of the new set; stay: rows of the old set, stay_to: where they go; fetch: chunks of the cold side,
    fetch_to: where they go; evicted: chunks that leave.
    """

    shape: tuple[int, int]
    stay: tuple[torch.Tensor, torch.Tensor]
    stay_to: tuple[torch.Tensor, torch.Tensor]
    fetch: tuple[torch.Tensor, torch.Tensor]
    fetch_to: tuple[torch.Tensor, torch.Tensor]
    evicted: int

    @property
    def fetched(self) -> int:
        return len(self.fetch[0])


class ResidentTable:
    """Which chunk lies in which row of the resident entries: the kept ones, then all that were made since.

    kept: [B, R] int64, ascending in each sequence, PAD first; fresh: the first chunk made since `kept` was fixed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Everything is resident, for any number of sequences."""
        self.kept, self.fresh = torch.empty(1, 0, dtype=torch.int64), 0

    def chunks(self, total: int, batch: int) -> torch.Tensor:
        """The chunk in every row, [B, rows], of `total` made so far."""
        fresh = torch.arange(self.fresh, total)
        return torch.cat([self.kept.expand(batch, -1), fresh.expand(batch, -1)], dim=1)

    def evicted(self) -> bool:
        """Whether some row is not the chunk of its own number."""
        return self.kept.shape[1] != self.fresh or self.padded()

    def padded(self) -> bool:
        """Whether sequences keep different numbers of chunks."""
        return bool((self.kept == PAD).any())

    def move_to(self, resident: Sequence[torch.Tensor], total: int) -> Move:
        """Fix the resident chunks of each sequence ([R] ascending ids below `total`) and say what must move."""
        old = self.chunks(total, len(resident))
        for sequence, chunks in enumerate(resident):
            inside = not len(chunks) or (int(chunks[0]) >= 0 and int(chunks[-1]) < total)
            if not inside or bool((chunks.diff() <= 0).any()):
                raise InputError(
                    f"resident chunks of sequence {sequence}: must be ascending, without repeats, below {total}"
                )
        longest = max(map(len, resident))
        new = torch.stack([torch.nn.functional.pad(c.long().cpu(), (longest - len(c), 0), value=PAD) for c in resident])
        row = torch.searchsorted(old, new).clamp_max(max(old.shape[1] - 1, 0))
        held = (old.gather(1, row) == new) & (new != PAD) if old.shape[1] else torch.zeros_like(new, dtype=torch.bool)
        stay_to, fetch_to = held.nonzero(as_tuple=True), (~held & (new != PAD)).nonzero(as_tuple=True)
        self.kept, self.fresh = new, total
        return Move(
            shape=(len(new), longest),
            stay=(stay_to[0], row[stay_to]),
            stay_to=stay_to,
            fetch=(fetch_to[0], new[fetch_to]),
            fetch_to=fetch_to,
            evicted=int((old != PAD).sum()) - len(stay_to[0]),
        )


class GrowingRows:
    """One kind of row of all chunks of one layer, in memory of its own; room doubles as they grow."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.room: torch.Tensor | None = None
        self.count = 0

    @property
    def rows(self) -> torch.Tensor:
        """[B, N, width]"""
        return self.room[:, : self.count]

    def append(self, entries: torch.Tensor) -> None:
        """entries: [B, n, width], copied."""
        batch, new, width = entries.shape
        if self.room is None or self.count + new > self.room.shape[1]:
            capacity = max(2 * self.count, self.count + new)
            room = torch.empty(batch, capacity, width, dtype=entries.dtype, device=self.device)
            if self.room is not None:
                room[:, : self.count] = self.rows
            self.room = room
        self.room[:, self.count : self.count + new] = entries
        self.count += new

    def fork(self) -> "GrowingRows":
        """The same rows, and no room to grow in: whoever appends first moves to room of its own."""
        twin = copy.copy(self)
        twin.room = None if self.room is None else self.rows
        return twin

    def reorder(self, sequences: torch.Tensor) -> None:
        if self.room is not None:
            self.room = self.room.index_select(0, sequences.to(self.room.device))


class ResidentCsaLayer(DeepseekV4CSACache):
    """One CSA layer. compressed_kv: the resident entries only, in the order of the table; cold: all of them;
    keys_so_far: chunk keys of all chunks, beside the model, once somebody asked."""

    _layer_type = None  # or it would replace the stock class in every cache of the process

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self._forget()

    def _forget(self) -> None:
        self.cold = {name: GrowingRows() for name in self.compressed_kv}
        self.keys_so_far: GrowingRows | None = None

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """New entries are resident at once and copied to the cold side."""
        self.cold[name].append(compressed)
        return super().update_compressor_states(name, compressed)

    def move(self, move: Move) -> None:
        """Rebuild the resident entries: those that stay from where they lie, the others from the cold side."""
        for name, hot in self.compressed_kv.items():
            rows = hot.new_zeros(*move.shape, hot.shape[-1])
            rows[_on(hot, move.stay_to)] = hot[_on(hot, move.stay)]
            rows[_on(hot, move.fetch_to)] = self.cold[name].rows[move.fetch].to(hot.device)
            self.compressed_kv[name] = rows

    def index_keys(self) -> torch.Tensor:
        """Keys of all chunks as a trace holds them: [B, N, d + 4] uint8, each encoded once."""
        if self.keys_so_far is None:
            self.keys_so_far = GrowingRows(self.device)
        new = self.cold["indexer"].rows[:, self.keys_so_far.count :].to(self.device)
        self.keys_so_far.append(encode_keys(hadamard(new)))
        return self.keys_so_far.rows

    def resident_bytes(self) -> int:
        return sum(hot.numel() * hot.element_size() for hot in self.compressed_kv.values() if hot is not None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for rows in [*self.cold.values(), self.keys_so_far]:
            if rows is not None:
                rows.reorder(beam_idx)

    def reset(self) -> None:
        super().reset()
        self._forget()


class ResidentCsaCache(DynamicCache):
    """A ResidentCsaLayer for every CSA layer, one table for all; sliding and HCA layers keep their stock cache.

    newest: what the newest token of each sequence brought into an observed CSA layer, by ordinal: [B, hidden].
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.csa = [layer for layer, kind in enumerate(config.layer_types) if kind == CSA]
        for layer in self.csa:
            self.layers[layer] = ResidentCsaLayer(config)
        self.table = ResidentTable()
        self.newest: dict[int, torch.Tensor] = {}

    @property
    def total(self) -> int:
        """Chunks made so far."""
        return self.layers[self.csa[0]].entry_count["compressor"]

    def resident(self) -> list[torch.Tensor]:
        """The resident chunks of each sequence, ascending."""
        hot = self.layers[self.csa[0]].compressed_kv["compressor"]
        batch = 1 if hot is None else len(hot)
        return [row[row != PAD] for row in self.table.chunks(self.total, batch)]

    def keep(self, resident: Sequence[torch.Tensor]) -> Move:
        """Make exactly these chunks resident, one [R] of ascending ids a sequence; later ones join on their own."""
        move = self.table.move_to(resident, self.total)
        if self.total:
            for layer in self.csa:
                self.layers[layer].move(move)
        return move

    def resident_bytes(self) -> int:
        """Bytes of the resident entries and native index keys of all CSA layers, as they lie."""
        return sum(self.layers[layer].resident_bytes() for layer in self.csa)

    def fork(self) -> "ResidentCsaCache":
        """An independent continuation of the same history; tensors are shared until either side goes on."""
        twin = copy.copy(self)
        twin.table, twin.newest = copy.copy(self.table), dict(self.newest)
        twin.layers = [_fork_layer(layer) for layer in self.layers]
        return twin

    def crop(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("compressed entries cannot be taken back: no assisted or speculative decoding")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if len(self.table.kept) > 1:
            self.table.kept = self.table.kept[beam_idx.cpu()]
        self.newest = {ordinal: state[beam_idx.to(state.device)] for ordinal, state in self.newest.items()}

    def reset(self) -> None:
        super().reset()
        self.table.reset()
        self.newest = {}


def _fork_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Stock layers replace their tensors and never write into them, so that new dicts around the same ones do."""
    twin = copy.copy(layer)
    for name, state in vars(layer).items():
        if isinstance(state, GrowingRows):
            setattr(twin, name, state.fork())
        elif isinstance(state, dict):
            setattr(
                twin, name, {key: rows.fork() if isinstance(rows, GrowingRows) else rows for key, rows in state.items()}
            )
    return twin


def _on(like: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].to(like.device), pair[1].to(like.device)
