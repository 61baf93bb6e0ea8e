"""Chunk keys: how they are made and stored; those of dense backbones are attention keys averaged over a chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from data_gen.core.key_bytes import SCALE_BYTES, check_rows, decode_keys, hadamard

KeyKind = Literal["mean_pre_rope", "mean_index_key", "fp8_rope_hadamard"]
"""mean_pre_rope: attention keys before RoPE, or the latent they are made of (MLA), averaged over a chunk.
mean_index_key: keys of lightning indexers over tokens (DSA) before RoPE, averaged over a chunk.
fp8_rope_hadamard: DeepSeek-V4's indexer keys after RoPE (at the chunk's first token) and Hadamard, rows of
core/key_bytes.py."""


@dataclass(frozen=True)
class KeyRecipe:
    """How a trace stores keys of one kind, and what queries go through to meet them.

    dtype: of stored values; beside: values of a stored row beyond the key's own width; turn: [..., d] -> [..., d], of
    queries after RoPE.
    """

    dtype: torch.dtype
    beside: int
    turn: Callable[[torch.Tensor], torch.Tensor]

    def row(self, width: int) -> int:
        """Values in a stored row of a key of `width` values."""
        return width + self.beside


KEY_RECIPES: dict[KeyKind, KeyRecipe] = {
    "mean_pre_rope": KeyRecipe(torch.float16, 0, lambda query: query),
    "mean_index_key": KeyRecipe(torch.float16, 0, lambda query: query),
    "fp8_rope_hadamard": KeyRecipe(torch.uint8, SCALE_BYTES, hadamard),
}
"""Every kind there is; `key_vectors` reads them all."""


def key_vectors(stored: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Keys as a trace stores them, uint8 rows [..., d + 4] or floats [..., d] -> [..., d] fp32, moved to `device`."""
    return decode_keys(stored, device) if stored.dtype == torch.uint8 else stored.to(device).float()


def check_stored(stored: torch.Tensor) -> None:
    """Raise InputError when stored keys, [..., d + 4] uint8, are damaged, see `check_rows`; floats may be anything."""
    if stored.dtype == torch.uint8:
        check_rows(stored)


class KeyPooler:
    """Averages keys over complete chunks as tokens arrive, in any number of pieces.

    pooled: [..., KV, N, d] fp32, one vector per complete chunk; sequences of a batch, if any, come first.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.pooled = self._unfinished = torch.empty(0)

    @property
    def _begun(self) -> bool:
        return self.pooled.dim() > 1

    def append(self, keys: torch.Tensor) -> None:
        """Add the keys of new tokens. keys: [..., KV, S, d], before RoPE: they carry content, no distance."""
        keys = keys.float()
        if not self._begun:
            self.pooled = self._unfinished = keys[..., :0, :]
        keys = torch.cat([self._unfinished, keys], dim=-2)
        whole = keys.shape[-2] // self.chunk_tokens * self.chunk_tokens
        if whole:
            means = keys[..., :whole, :].unflatten(-2, (-1, self.chunk_tokens)).mean(dim=-2)
            self.pooled = torch.cat([self.pooled, means], dim=-2)
        self._unfinished = keys[..., whole:, :]

    def reorder(self, sequences: torch.Tensor) -> None:
        """Make sequence i of a batch what sequence `sequences[i]` was."""
        if self._begun:
            sequences = sequences.to(self.pooled.device)
            self.pooled, self._unfinished = self.pooled[sequences], self._unfinished[sequences]


def flatten_heads(pooled: torch.Tensor) -> torch.Tensor:
    """One vector per chunk: [..., KV, N, d] -> [..., N, KV * d]."""
    return pooled.transpose(-3, -2).flatten(-2)


def mean_pooled_scores(
    queries: torch.Tensor, pooled: torch.Tensor, scaling: float, visible: torch.Tensor
) -> torch.Tensor:
    """Score chunks by the backbone's own queries against mean-pooled keys (the untrained baseline).

    queries: [H, R, d] before RoPE; pooled: [KV, N, d]; scaling: the attention's; visible: [R], complete chunks that
    each query sees. Returns [R, N] fp32, the softmax over visible chunks averaged over heads, zero elsewhere.
    Attention is grouped: query head h reads key head h // (H / KV).
    """
    groups = queries.shape[0] // pooled.shape[0]
    grouped = queries.float().unflatten(0, (pooled.shape[0], groups))
    logits = torch.einsum("kgrd,knd->kgrn", grouped, pooled) * scaling
    hidden = torch.arange(pooled.shape[1], device=visible.device) >= visible[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0).mean(dim=(0, 1))
