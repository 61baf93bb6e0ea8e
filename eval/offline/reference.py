"""The indexer's score once more, in float64 NumPy and none of the package's arithmetic: what `verify` compares with."""

import math

import numpy as np
import torch

from data_gen.core.rope import Rope
from indexer_train.model import IndexerSpec, MemoryIndexer

TILE = 1 << 14
"""Chunks scored at once."""


def reference_scores(
    indexer: MemoryIndexer, hidden: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> np.ndarray:
    """What `MemoryIndexer.joined_scores` returns. hidden: [B, L, hidden]; keys: [N, L, ...] as stored -> [B, N]."""
    state = {name: value.detach().cpu().double().numpy() for name, value in indexer.query_encoder.state_dict().items()}
    logits = []
    for place, layer in enumerate(indexer.spec.layers):
        prefix = f"encoders.{layer}."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        logits.append(layer_logits(indexer.spec, weights, hidden[:, place], keys[:, place], positions))
    joined = {"max": np.max, "mean": np.mean, "sum": np.sum}[indexer.spec.shape.join]
    return joined(np.stack(logits) + state.get("bias", np.zeros(1)), axis=0)


def layer_logits(
    spec: IndexerSpec, weights: dict[str, np.ndarray], hidden: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> np.ndarray:
    """Logits of one layer without the bias. weights: by parameter name; hidden: [B, hidden]; returns [B, N]."""
    shape, states, tokens = spec.shape, hidden.double().numpy(), positions.numpy()
    latent = states @ weights["wq_a.weight"].T
    latent = latent / np.sqrt(np.mean(latent**2, axis=1, keepdims=True) + 1e-6) * weights["q_norm.weight"]
    query = (latent @ weights["wq_b.weight"].T).reshape(len(states), shape.heads, spec.key_width)
    if spec.rope is not None:
        query = rotated(query, tokens, spec.rope)
    if spec.key == "fp8_rope_hadamard":
        query = query @ sylvester(spec.key_width)
    logits = match(query, states @ weights["weights_proj.weight"].T / math.sqrt(spec.key_width * shape.heads), keys)
    if "extras.weight" not in weights:
        return logits
    extras = states @ weights["extras.weight"].T + weights["extras.bias"]
    first = np.arange(len(keys)) * spec.chunking.tokens
    far = np.log2(np.maximum(tokens[:, None] - first, 1))
    for bump in range(shape.distance_bumps):
        near = np.abs(np.clip(far, 4, 3 + shape.distance_bumps) - (4 + bump))
        logits = logits + extras[:, bump, None] * np.maximum(1 - near, 0)
    if shape.scale:
        logits = logits * np.exp(extras[:, shape.distance_bumps, None])
    return logits - extras[:, -1:] if shape.slot else logits


def match(query: np.ndarray, weights: np.ndarray, keys: torch.Tensor) -> np.ndarray:
    """sum_h weights[b, h] relu(query[b, h] . key[n]). query: [B, H, d]; weights: [B, H]; keys as stored -> [B, N]."""
    logits = np.empty((len(query), len(keys)))
    for first in range(0, len(keys), TILE):
        tile = decoded(keys[first : first + TILE])
        for row, (heads, scales) in enumerate(zip(query, weights, strict=True)):
            logits[row, first : first + TILE] = scales @ np.maximum(heads @ tile.T, 0)
    return logits


def decoded(keys: torch.Tensor) -> np.ndarray:
    """Stored keys [N, ...] -> [N, d]: floats as they are, bytes as float8_e4m3fn values times a fp32 scale."""
    if keys.dtype != torch.uint8:
        return keys.double().numpy()
    stored = keys.numpy()
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 512, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[[0x7F, 0xFF]] = np.nan
    values = np.where(codes < 128, values, -values)
    return values[stored[:, :-4]] * np.ascontiguousarray(stored[:, -4:]).view("<f4").astype(np.float64)


def rotated(query: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    """Pairs of the last dims of query [B, H, d] turned by fp32(position) * fp32(frequency), in exact arithmetic."""
    single = np.float32
    power = (rope.theta ** (np.arange(0, rope.dims, 2) / rope.dims)).astype(single)
    keep = np.ones(rope.dims // 2, single)
    if rope.factor != 1:
        turns = [rope.original / (2 * math.pi * beta) for beta in (rope.beta_fast, rope.beta_slow)]
        ends = [rope.dims * math.log(turn) / (2 * math.log(rope.theta)) for turn in turns]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), rope.dims - 1)
        ramp = (np.arange(rope.dims // 2, dtype=single) - single(low)) / single(max(high - low, 1e-3))
        keep = single(1) - np.clip(ramp, 0, 1)
    frequency = single(1) / (single(rope.factor) * power) * (single(1) - keep) + single(1) / power * keep
    turn = np.exp(1j * (positions.astype(single)[:, None] * frequency).astype(np.float64))[:, None]
    pairs = query[..., -rope.dims :: 2] + 1j * query[..., -rope.dims + 1 :: 2]
    result = query.copy()
    result[..., -rope.dims :: 2], result[..., -rope.dims + 1 :: 2] = (pairs * turn).real, (pairs * turn).imag
    return result


def sylvester(width: int) -> np.ndarray:
    """The Hadamard matrix / sqrt(width), [width, width]: negative at (i, j) where i & j has an odd number of bits."""
    index = np.arange(width)
    odd = np.bitwise_count(index[:, None] & index) & 1
    return (1 - 2.0 * odd) / math.sqrt(width)
