"""What a backbone tells of itself and what a document leaves behind; no backbone is needed to read it."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from data_gen.core.rope import Rope
from data_gen.traces.labels import GoldenChunks, SparseAttention

KeyKind = Literal["mean_pre_rope", "fp8_rope_hadamard"]
"""mean_pre_rope: attention keys averaged over a chunk, [N, key_width] fp16. fp8_rope_hadamard: DeepSeek-V4's indexer
keys after RoPE (at the chunk's first token) and Hadamard, [N, key_width + 4] uint8 rows of core/key_bytes.py."""


@dataclass(frozen=True)
class BackboneInfo:
    """Facts that tie traces, indexers and bundles to one backbone.

    fingerprint: hash of the weights; full_layers: layers that see the whole history (the oracle pools over them), on
    DeepSeek-V4 the ordinals of its compressed sparse attention (CSA) layers: ordinal 10 of V4-Flash is its layer 22;
    hidden, key_width: widths of a hidden state and of one decoded chunk key; context: longest document in tokens;
    key: how keys were made; rope: the rotation in them, which queries need too, None where keys have no position;
    name: what anybody can load the model by (hub id, file of a package), None for local files; it decides nothing.
    """

    model_type: str
    fingerprint: str
    full_layers: list[int]
    hidden: int
    key_width: int
    context: int
    key: KeyKind = "mean_pre_rope"
    rope: Rope | None = None
    name: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class NativeRow:
    """What the backbone's own indexer computed for one query token of one layer, to verify a trace against.

    logits: [n_visible], one per visible chunk; query: [H, d] after RoPE and Hadamard; weights: [H], scaled. Query and
    weights may be missing.
    """

    logits: torch.Tensor
    query: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class RawTrace:
    """What one document leaves behind, T query tokens and N complete chunks.

    hidden: layer -> [T, hidden] bf16, entering the attention block; keys: layer -> [N, ...], see KeyKind;
    positions: [T] int64; oracle: attention probabilities or the native indexer's votes;
    mean_pooled: [T, N] fp16, the untrained baseline's scores of dense backbones;
    native: (layer, row) -> what the native indexer computed there; near_ties: query tokens x layers whose recomputed
    top-k differs from the backbone's own picks, by ties at the cut alone.
    """

    hidden: dict[int, torch.Tensor]
    keys: dict[int, torch.Tensor]
    positions: torch.Tensor
    oracle: SparseAttention | GoldenChunks
    mean_pooled: torch.Tensor | None = None
    native: dict[tuple[int, int], NativeRow] = field(default_factory=dict)
    near_ties: int = 0
