"""First weights from the backbone's own lightning indexers, read tensor by tensor; the backbone is never loaded.

Understood: a folder of safetensors shards of a `deepseek_v4` model, in DeepSeek's or transformers' names, or of a model
with sparse attention over tokens (DSA), in transformers' names; in bf16, fp32 or fp8 with block scales; and the
release's folder of layer_NN.safetensors files (NN = 2 * ordinal + 2).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_gen.core.errors import InputError
from data_gen.core.fingerprint import INDEX
from indexer_train.formats.weights import LayerWeights
from indexer_train.model import MemoryIndexer

DEEPSEEK = {
    "wq_a": "attn.wq_a",
    "q_norm": "attn.q_norm",
    "wq_b": "attn.indexer.wq_b",
    "weights_proj": "attn.indexer.weights_proj",
}
TRANSFORMERS = {
    "wq_a": "self_attn.q_a_proj",
    "q_norm": "self_attn.q_a_norm",
    "wq_b": "self_attn.compressor.indexer.q_b_proj",
    "weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
}
DSA = {
    "wq_a": "self_attn.q_a_proj",
    "q_norm": "self_attn.q_a_layernorm",
    "wq_b": "self_attn.indexer.wq_b",
    "weights_proj": "self_attn.indexer.weights_proj",
}
LAYER_FILE = {
    "wq_a": "wq_a",
    "q_norm": "q_norm",
    "wq_b": "indexer.wq_b",
    "weights_proj": "indexer.weights_proj",
}
SCALES = ("weight_scale_inv", "scale")
"""Names of an fp8 weight's block scales: transformers', DeepSeek's."""
SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8)


def initialise(indexer: MemoryIndexer, folder: Path) -> None:
    """Start every layer of `indexer` from the native indexer at `folder`; more heads and ranks stay as drawn.

    Raises InputError when a layer is missing there or is larger than the indexer's.
    """
    spec = indexer.spec
    for layer, native in read_native(folder, spec.layers).items():
        ours = (spec.hidden, spec.key_width, spec.shape.heads, spec.shape.rank)
        theirs = (native.hidden, native.width, native.heads, native.rank)
        if ours[:2] != theirs[:2]:
            raise InputError(f"{folder}: hidden and key width are {theirs[:2]}, the traces' are {ours[:2]}")
        if native.heads > spec.shape.heads or native.rank > spec.shape.rank:
            raise InputError(
                f"{folder}: the native indexer has {native.heads} heads and rank {native.rank}, more than the recipe's "
                f"{spec.shape.heads} and {spec.shape.rank}; raise indexer.heads and indexer.rank"
            )
        native.copy_into(indexer.query_encoder.encoder(layer))


def read_native(folder: Path, layers: list[int]) -> dict[int, LayerWeights]:
    """The native indexers of these layers, by ordinal among CSA layers or, with DSA, by number, in fp32. Reads nothing
    else of the checkpoint.

    Raises InputError when the folder is no such checkpoint or lacks a layer.
    """
    if (folder / INDEX).exists() or (folder / "model.safetensors").exists():
        return _read_sharded(folder, layers)
    if list(folder.glob("layer_*.safetensors")):
        return {layer: _read_layer_file(folder / f"layer_{2 * layer + 2:02d}.safetensors") for layer in layers}
    raise InputError(
        f"{folder}: neither a safetensors checkpoint ({INDEX} or model.safetensors) nor layer_NN.safetensors files"
    )


def _read_sharded(folder: Path, layers: list[int]) -> dict[int, LayerWeights]:
    files = _weight_map(folder)
    asks = "|".join(names["wq_b"] for names in (DEEPSEEK, TRANSFORMERS, DSA))
    pattern = re.compile(rf"((?:model\.)?layers\.(\d+)\.)({asks})\.weight")
    matches = sorted((match for match in map(pattern.fullmatch, files) if match), key=lambda match: int(match[2]))
    if not matches:
        raise InputError(f"{folder}: no layer with an indexer there; is it a checkpoint of DeepSeek-V4, or with DSA?")
    dsa = matches[0][3] == DSA["wq_b"]
    found = {int(match[2]) if dsa else ordinal: match for ordinal, match in enumerate(matches)}
    if missing := [layer for layer in layers if layer not in found]:
        what = (
            f"indexers in layers {sorted(found)}" if dsa else f"{len(found)} CSA layers, ordinals 0..{len(found) - 1}"
        )
        raise InputError(f"{folder}: has {what}; {missing} are not there")
    block = _block_size(folder)
    weights = {}
    for layer in layers:
        prefix, number, asked = found[layer].groups()
        names = next(names for names in (DEEPSEEK, TRANSFORMERS, DSA) if names["wq_b"] == asked)
        tensors = {part: _read_weight(folder, files, prefix + name, block) for part, name in names.items()}
        weights[layer] = LayerWeights.checked(f"{folder}, layer {number}", **tensors)
    return weights


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = folder / INDEX
    if not index.exists():
        return dict.fromkeys(_open(folder / "model.safetensors").keys(), "model.safetensors")
    found = _json_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise InputError(f"{index}: not the index of a sharded checkpoint (its weight_map names no files)")
    return found


def _block_size(folder: Path) -> list[int] | None:
    """[rows, columns] that share one fp8 scale, as the checkpoint's config says; None when it is not quantised."""
    path = folder / "config.json"
    if not path.exists():
        return None
    quantised = _json_object(path).get("quantization_config") or {}
    block = quantised.get("weight_block_size") if isinstance(quantised, dict) else quantised
    pair = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if block is not None and not pair:
        raise InputError(f"{path}: quantization_config.weight_block_size is not [rows, columns] of a block")
    return block


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def _read_weight(folder: Path, files: dict[str, str], name: str, block: list[int] | None) -> torch.Tensor:
    """One weight, its block scales multiplied in: [...] fp32 or as stored."""
    if f"{name}.weight" not in files:
        raise InputError(f"{folder}: tensor {name}.weight is missing")
    weight = _tensor(folder / files[f"{name}.weight"], f"{name}.weight")
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    scales = [f"{name}.{suffix}" for suffix in SCALES if f"{name}.{suffix}" in files]
    if not scales or block is None:
        what = "a scale tensor beside it" if not scales else "quantization_config.weight_block_size in config.json"
        raise InputError(f"{folder}: {name}.weight is fp8 without {what}")
    return dequantise(f"{folder}: {name}", weight, _tensor(folder / files[scales[0]], scales[0]), block)


def dequantise(where: str, weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """fp8 weight [M, N] times the scale of its block -> fp32.

    scale: [ceil(M / block rows), ceil(N / block columns)], fp32, bf16, float8_e8m0fnu or that format's raw bytes.
    Raises InputError, which begins with `where`, for scales of another dtype or shape.
    """
    if scale.dtype not in SCALE_TYPES:
        raise InputError(f"{where}: scales are {scale.dtype}, not fp32, bf16, float8_e8m0fnu or its bytes")
    grid = [-(-size // step) for size, step in zip(weight.shape, block, strict=False)]
    if weight.ndim != 2 or list(scale.shape) != grid:
        raise InputError(f"{where}: scales {list(scale.shape)} for blocks of {block} of {list(weight.shape)}")
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    spread = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]


def _read_layer_file(path: Path) -> LayerWeights:
    tensors = {part: _tensor(path, f"{name}.weight") for part, name in LAYER_FILE.items()}
    return LayerWeights.checked(str(path), **tensors)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error


def _tensor(path: Path, name: str) -> torch.Tensor:
    try:
        return _open(path).get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{path}: tensor {name} cannot be read ({str(error).splitlines()[0]})") from error
