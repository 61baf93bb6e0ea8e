"""Lightning indexers of a DeepSeek-V3.2: scores with a gradient, picks of a whole batch, and the probe of both.

The stock indexer scores without a gradient, and of several documents at once it copies the keys for every row.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32Attention,
    DeepseekV32Indexer,
    apply_rotary_pos_emb,
)

from recipes.pocket.reading import Probe, read_layer

ROWS = 256
"""Query rows of each document that the KL is taken of: those of answers first."""
TILE = 1 << 28
"""Scores of heads held at once while picking."""
Inputs = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]
"""What an indexer reads: hidden states [B, S, D], compressed queries [B, S, r], rotary tables (cos, sin) [., S, d]."""


def index_keys(indexer: Any, inputs: Inputs) -> Tensor:
    """[B, S, d], after RoPE."""
    hidden, _, (cos, sin) = inputs
    return _turned(indexer, indexer.k_norm(indexer.wk(hidden)).unsqueeze(2), cos, sin).squeeze(2)


def index_scores(indexer: Any, inputs: Inputs, rows: Tensor, keys: Tensor) -> Tensor:
    """Scores of every token for query rows [B, R] of each document: [B, R, S], later tokens included."""
    hidden, residual, tables = inputs
    batch, count = rows.shape
    hidden, residual = (_rows_of(states, rows) for states in (hidden, residual))
    cos, sin = (_rows_of(table.expand(batch, -1, -1), rows) for table in tables)
    query = indexer.wq_b(residual).view(batch, count, indexer.n_heads, indexer.head_dim)
    query = _turned(indexer, query, cos, sin)
    match = torch.relu(torch.matmul(query.flatten(1, 2), keys.transpose(1, 2))).unflatten(1, (count, -1))
    weights = indexer.weights_proj(hidden).float() * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    return torch.matmul(weights.unsqueeze(2), match.to(weights.dtype)).squeeze(2)


def _turned(indexer: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """states: [B, S, H, d]; RoPE turns its first dims."""
    turning = indexer.qk_rope_head_dim
    turned, _ = apply_rotary_pos_emb(states[..., :turning], states[..., :turning], cos, sin, unsqueeze_dim=2)
    return torch.cat([turned, states[..., turning:]], dim=-1)


def _rows_of(states: Tensor, rows: Tensor) -> Tensor:
    """states: [B, S, ...], rows: [B, R] -> [B, R, ...]."""
    return states.gather(1, rows.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


@torch.no_grad()
def pick(
    self: Any,
    hidden_states: Tensor,
    q_resid: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    *unused: object,
    **none: object,
) -> Tensor:
    """The stock indexer's picks [B, S, k], tile by tile; without a cache. attention_mask: [., S, S] bool."""
    batch, length = hidden_states.shape[:2]
    device = hidden_states.device
    if self.index_topk >= length:
        return torch.arange(length, device=device, dtype=torch.int32).expand(batch, length, length)
    inputs = hidden_states, q_resid, position_embeddings
    keys = index_keys(self, inputs)
    size = max(1, TILE // (batch * self.n_heads * length))
    picks = []
    for first in range(0, length, size):
        rows = torch.arange(first, min(first + size, length), device=device).expand(batch, -1)
        scores = index_scores(self, inputs, rows, keys)
        scores = scores.masked_fill(~attention_mask[:, first : first + size], float("-inf"))
        picks.append(scores.topk(self.index_topk, dim=-1).indices.to(torch.int32))
    return torch.cat(picks, dim=1)


def pick_in_batches(model: nn.Module) -> None:
    """Let every indexer of `model` pick by `pick`."""
    for module in model.modules():
        if isinstance(module, DeepseekV32Indexer):
            module.forward = MethodType(pick, module)


class TokenProbe(Probe):
    """Reads every layer on ROWS rows of each document (see Probe)."""

    def __init__(self, model: nn.Module, topk: int, answer_rows: float, answers: Tensor) -> None:
        super().__init__(model, topk, answer_rows, answers)
        length = answers.shape[1]
        place = torch.arange(length, device=answers.device)
        order = (
            place * 7919 % length
        ).float() / length  # any spread will do, as long as a step made again has the same
        self.rows = (answers + order).topk(min(ROWS, length), dim=1).indices.sort(dim=1).values  # [B, R]
        self.inputs: Inputs | None = None
        self.picks = torch.empty(0)
        for attention in (module for module in model.modules() if isinstance(module, DeepseekV32Attention)):
            self.handles += [
                attention.register_forward_pre_hook(self._ask, with_kwargs=True),
                attention.indexer.register_forward_pre_hook(self._keep),
                attention.indexer.register_forward_hook(self._picked),
                attention.register_forward_hook(partial(self._read, attention.indexer)),
            ]

    def _ask(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"rows": self.rows}

    def _keep(self, _: nn.Module, args: tuple) -> None:
        self.inputs = args[0].detach(), args[1].detach(), args[2]

    def _picked(self, _: nn.Module, __: tuple, picks: Tensor) -> None:
        self.picks = picks

    def _read(self, indexer: Any, _: nn.Module, __: tuple, output: tuple[Tensor, Tensor]) -> None:
        inputs, self.inputs = self.inputs, None
        assert inputs is not None
        scores = index_scores(indexer, inputs, self.rows, index_keys(indexer, inputs))
        picks = _rows_of(self.picks, self.rows).long()
        picks = picks.gather(-1, scores.detach().gather(-1, picks).argsort(dim=-1, descending=True))
        later = picks > self.rows.unsqueeze(-1)  # picked where fewer tokens than the top-k are there yet
        order = later.long().argsort(dim=-1, stable=True)
        picks = picks.masked_fill(later, -1).gather(-1, order)
        answers = self.answers.gather(1, self.rows)
        self.readings.append(read_layer(scores, picks, output[1], answers, self.answer_rows, self.topk))
