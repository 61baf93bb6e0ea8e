"""What a backbone tells of itself and what a document leaves behind; no backbone is needed to read it."""

from dataclasses import dataclass

import torch

from data_gen.oracle import SparseAttention


@dataclass(frozen=True)
class BackboneInfo:
    """Facts that tie traces, indexers and bundles to one backbone.

    fingerprint: hash of the weights; full_layers: layers with full attention (the oracle pools over them);
    hidden, key_width: widths of a hidden state and of one chunk key; context: longest document in tokens.
    """

    model_type: str
    fingerprint: str
    full_layers: list[int]
    hidden: int
    key_width: int
    context: int

@dataclass(frozen=True)
class RawTrace:
    """What one document leaves behind, T query tokens and N complete chunks.

    hidden: layer -> [T, hidden] bf16, entering the attention block; keys: layer -> [N, key_width] fp16;
    positions: [T] int64; attention: the oracle; mean_pooled: [T, N] fp16, the untrained baseline's scores.
    """

    hidden: dict[int, torch.Tensor]
    keys: dict[int, torch.Tensor]
    positions: torch.Tensor
    attention: SparseAttention
    mean_pooled: torch.Tensor
