"""One dump -> what the trace store keeps of it; every tensor is checked, nothing is made up."""

from dataclasses import dataclass

import torch

from data_gen.errors import InputError
from data_gen.key_codec import check_rows
from data_gen.rope import Rope
from data_gen.trace import BackboneInfo, NativeRow, RawTrace
from data_gen.votes import GoldenChunks

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
)
"""The one model that dumps come from."""
SAMPLED_TOKENS = 3
"""First decode tokens whose native logits a dump may hold."""


@dataclass(frozen=True)
class Dropped:
    """Labels of a dump that name no chunk, or a chunk that was not complete yet at that token."""

    out_of_range: int
    not_visible: int


def read_document(tensors: dict[str, torch.Tensor], layers: list[int]) -> tuple[RawTrace, Dropped]:
    """Check a dump's tensors and keep those of `layers` (CSA ordinals).

    Raises InputError that names the first tensor with a wrong shape, dtype or content.
    """
    positions = _tensor(tensors, f"positions_layer_{layers[0]}", torch.int64, 1)
    _require(len(positions) > 0 and int(positions[0]) >= 0, f"positions_layer_{layers[0]} is empty or negative")
    _require(bool((positions.diff() > 0).all()), f"positions_layer_{layers[0]} does not ascend")
    last = int(positions[-1])
    _require(last < V4_FLASH.context, f"positions_layer_{layers[0]} reaches {last}, beyond {V4_FLASH.context - 1}")
    hidden, keys, native = {}, {}, {}
    for layer in layers:
        same = _tensor(tensors, f"positions_layer_{layer}", torch.int64, 1)
        _require(torch.equal(same, positions), f"positions_layer_{layer} differs from the first layer's")
        hidden[layer] = _tensor(tensors, f"hidden_layer_{layer}", torch.bfloat16, 2)
        shape = [len(positions), V4_FLASH.hidden]
        _require(
            list(hidden[layer].shape) == shape, f"hidden_layer_{layer} is {list(hidden[layer].shape)}, not {shape}"
        )
        extremes = torch.stack(hidden[layer].aminmax())  # NaN spreads; 30 times as fast as isfinite of every value
        _require(bool(extremes.isfinite().all()), f"hidden_layer_{layer} holds NaN or infinity")
        keys[layer] = _keys(tensors, layer)
        _require(len(keys[layer]) == len(keys[layers[0]]), f"compk_layer_{layer} has another number of chunks")
        for row in range(min(SAMPLED_TOKENS, len(positions))):
            if (found := _native(tensors, layer, row)) is not None:
                native[layer, row] = found
    golden, dropped = _labels(tensors, positions, len(keys[layers[0]]))
    return RawTrace(hidden, keys, positions, golden, native=native), dropped


def _keys(tensors: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    name = f"compk_layer_{layer}"
    rows = _tensor(tensors, name, torch.uint8, 2)
    width = V4_FLASH.key_width + 4
    _require(rows.shape[1] == width, f"{name} has rows of {rows.shape[1]} bytes, not {width}")
    try:
        check_rows(rows)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return rows


def _native(tensors: dict[str, torch.Tensor], layer: int, row: int) -> NativeRow | None:
    """What the dump holds of decode token `row`; the server fuses each query head's fp8 scale into its weights.

    Logits may outnumber the keys by chunks that the answer completed: some dumps hold the prompt's keys only.
    """
    suffix = f"_layer_{layer}_token_{row}"
    if f"logits{suffix}" not in tensors:
        return None
    logits = _tensor(tensors, f"logits{suffix}", torch.bfloat16, 1)
    if f"q{suffix}" not in tensors or f"weights{suffix}" not in tensors:
        return NativeRow(logits)
    query, weights = tensors[f"q{suffix}"].flatten(), tensors[f"weights{suffix}"].flatten()
    shapes = f"q{suffix} and weights{suffix} are {query.numel()} and {weights.numel()} values"
    _require(query.numel() == weights.numel() * V4_FLASH.key_width > 0, f"{shapes}, not heads of {V4_FLASH.key_width}")
    return NativeRow(logits, query.reshape(-1, V4_FLASH.key_width), weights)


def _labels(tensors: dict[str, torch.Tensor], positions: torch.Tensor, chunks: int) -> tuple[GoldenChunks, Dropped]:
    """The golden chunks that exist and were visible; the others are counted and dropped."""
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
    kept = exists & visible
    kept_counts = torch.zeros(len(positions), dtype=torch.int64).index_add_(0, token, kept.long())
    golden = GoldenChunks(
        torch.nn.functional.pad(kept_counts.cumsum(0), (1, 0)), index[kept].to(torch.int32), votes[kept]
    )
    return golden, Dropped(int((~exists).sum()), int((exists & ~visible).sum()))


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
