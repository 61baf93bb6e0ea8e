"""One dump -> what the trace store keeps of it; every tensor is checked, nothing is made up."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from data_gen.core.entry_bytes import compressed_bytes, index_key_bytes
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import check_rows
from data_gen.core.rope import Rope
from data_gen.traces.types import BackboneInfo, GoldenChunks, NativeRow, RawTrace

CHUNK_TOKENS = 4
V4_FLASH = BackboneInfo(
    model_type="deepseek_v4",
    fingerprint="flashmemory-dump",  # dumps do not say which weights made them
    full_layers=list(range(21)),
    hidden=4096,
    key_width=128,
    context=1 << 20,
    key="fp8_rope_hadamard",
    rope=Rope(dims=64, theta=160000, positions=1 << 20, factor=16),
    entry_bytes=21 * (compressed_bytes(448, 64) + index_key_bytes(128)),
)
"""The one model that dumps come from."""
SAMPLED_TOKENS = 3
"""First decode tokens whose native logits a dump may hold."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Dropped:
    """How much of a dump was left out.

    out_of_range, not_visible, repeated: labels that name no chunk, a chunk that was not complete yet at that token, a
    chunk that the token has named before; native_rows: native logits that are not finite numbers, one a visible chunk.
    """

    out_of_range: int = 0
    not_visible: int = 0
    repeated: int = 0
    native_rows: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(sum, zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        return (
            f"labels dropped: {self.out_of_range} of chunks that do not exist, {self.not_visible} not yet visible, "
            f"{self.repeated} repeated; native rows dropped: {self.native_rows}"
        )


def read_document(tensors: dict[str, torch.Tensor], layers: list[int]) -> tuple[RawTrace, Dropped]:
    """Check a dump's tensors, [T, ...] of query tokens and [N, ...] of chunks; keep those of `layers` (CSA ordinals).

    Raises InputError that names the first tensor with a wrong shape, dtype or content.
    """
    positions = _tensor(tensors, f"positions_layer_{layers[0]}", torch.int64, 1)
    _require(len(positions) > 0 and int(positions[0]) >= 0, f"positions_layer_{layers[0]} is empty or negative")
    _require(bool((positions.diff() > 0).all()), f"positions_layer_{layers[0]} does not ascend")
    last = int(positions[-1])
    _require(last < V4_FLASH.context, f"positions_layer_{layers[0]} reaches {last}, beyond {V4_FLASH.context - 1}")
    hidden, keys, native, unusable = {}, {}, {}, 0
    for layer in layers:
        same = _tensor(tensors, f"positions_layer_{layer}", torch.int64, 1)
        _require(torch.equal(same, positions), f"positions_layer_{layer} differs from the first layer's")
        hidden[layer] = _tensor(tensors, f"hidden_layer_{layer}", torch.bfloat16, 2)
        shape = [len(positions), V4_FLASH.hidden]
        _require(
            list(hidden[layer].shape) == shape, f"hidden_layer_{layer} is {list(hidden[layer].shape)}, not {shape}"
        )
        extremes = torch.stack(hidden[layer].aminmax())  # NaN spreads; much faster than isfinite of every value
        _require(bool(extremes.isfinite().all()), f"hidden_layer_{layer} holds NaN or infinity")
        keys[layer] = _keys(tensors, layer)
        _require(len(keys[layer]) == len(keys[layers[0]]), f"compk_layer_{layer} has another number of chunks")
        for row in range(min(SAMPLED_TOKENS, len(positions))):
            if f"logits_layer_{layer}_token_{row}" not in tensors:
                continue
            found = _native(tensors, layer, row, visible=(int(positions[row]) + 1) // CHUNK_TOKENS)
            if found is None:
                unusable += 1
            else:
                native[layer, row] = found
    golden, dropped = _labels(tensors, positions, len(keys[layers[0]]))
    return RawTrace(hidden, keys, positions, golden, native=native), replace(dropped, native_rows=unusable)


def _keys(tensors: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    name = f"compk_layer_{layer}"
    rows = _tensor(tensors, name, torch.uint8, 2)
    width = V4_FLASH.key_width + 4
    _require(rows.shape[1] == width, f"{name} has rows of {rows.shape[1]} bytes, not {width}")
    _require(len(rows) > 0, f"{name} holds no key")
    try:
        check_rows(rows)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return rows


def _native(tensors: dict[str, torch.Tensor], layer: int, row: int, visible: int) -> NativeRow | None:
    """What the dump holds of decode token `row`, None where that proves nothing: training does without it.

    The server fuses each query head's fp8 scale into its weights. Logits may outnumber the keys by chunks that the
    answer completed: some dumps hold the prompt's keys only.
    """
    names = (f"{part}_layer_{layer}_token_{row}" for part in ("logits", "q", "weights"))
    logits, *rest = (tensors[name].flatten() for name in names if name in tensors)
    if any(part.dtype not in FLOATS or not bool(part.isfinite().all()) for part in (logits, *rest)):
        return None
    if len(logits) != visible:
        return None
    if len(rest) < 2:
        return NativeRow(logits)
    query, weights = rest
    if len(weights) * V4_FLASH.key_width != len(query) or not len(weights):
        return None
    return NativeRow(logits, query.reshape(-1, V4_FLASH.key_width), weights)


def _labels(tensors: dict[str, torch.Tensor], positions: torch.Tensor, chunks: int) -> tuple[GoldenChunks, Dropped]:
    """The golden chunks that exist and were visible, each once per token; the others are counted and dropped."""
    index = _tensor(tensors, "label_indices", torch.int32, 1).long()
    votes = _tensor(tensors, "label_scores", torch.int32, 1)
    pointers = _tensor(tensors, "label_pointers", torch.int32, 1).long()
    _require(
        len(pointers) == len(positions) + 1, f"label_pointers has {len(pointers)} entries for {len(positions)} tokens"
    )
    _require(len(votes) == len(index), "label_scores and label_indices differ in length")
    counts = pointers.diff()
    ends_meet = int(pointers[0]) == 0 and int(pointers[-1]) == len(index)
    _require(ends_meet and bool((counts >= 0).all()), "label_pointers does not ascend from 0 to the number of labels")
    layers = len(V4_FLASH.full_layers)
    _require(
        bool(((votes > 0) & (votes <= layers)).all()), f"label_scores holds a score that is not 1 to {layers} layers"
    )
    token = torch.repeat_interleave(torch.arange(len(positions)), counts)
    exists = (index >= 0) & (index < chunks)
    visible = index < (positions[token] + 1) // CHUNK_TOKENS
    named = exists & visible
    kept = named & _first_of_each(torch.where(named, token * chunks + index, -1))
    kept_counts = torch.zeros(len(positions), dtype=torch.int64).index_add_(0, token, kept.long())
    golden = GoldenChunks(
        torch.nn.functional.pad(kept_counts.cumsum(0), (1, 0)), index[kept].to(torch.int32), votes[kept]
    )
    return golden, Dropped(int((~exists).sum()), int((exists & ~visible).sum()), int((named & ~kept).sum()))


def _first_of_each(values: torch.Tensor) -> torch.Tensor:
    """Mark the first of all that are equal: [M] -> [M] bool."""
    ordered, order = values.sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[order[1:]] = ordered.diff() != 0
    return first


def _tensor(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype, dims: int) -> torch.Tensor:
    if name not in tensors:
        raise InputError(f"{name} is missing")
    found = tensors[name]
    _require(
        found.dtype == dtype and found.ndim == dims,
        f"{name} is {found.dtype} {list(found.shape)}, not {dtype}, {dims}-D",
    )
    return found


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise InputError(complaint)
