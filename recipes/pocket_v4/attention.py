"""The same attention and experts as the stock model, without S x S scores: registered under the name `pocket`.

Stock eager attention scores every pair of tokens and masks all but the sliding window. Here the window is computed
in bands, the compressed entries next to it, and one softmax with the sink joins them. Numbers agree with `eager`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pocket"


def no_mask(batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """A mask [B, 1, S, 0] of no local keys: banded attention knows its window, and the model appends entry masks."""
    return {"local": torch.zeros(batch, 1, length, 0, device=device)}


def banded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    sliding_window: int,
    s_aux: Tensor,
    **unused: object,
) -> tuple[Tensor, Tensor]:
    """Joint softmax over window, compressed entries and sink.

    query: [B, H, S, D]. key is value: [B, 1, S + T, D], tokens then entries. attention_mask: additive, [B, 1, S, T].
    Returns the output [B, S, H, D] and the attention mass of each entry summed over heads, [B, S, T] fp32, detached.
    """
    batch, heads, length, width = query.shape
    window, entries = sliding_window, key.shape[2] - length
    pad = -length % window
    tokens = F.pad(key[:, 0, :length], (0, 0, window, pad)).view(batch, -1, window, width)  # one empty block in front
    band = torch.cat([tokens[:, :-1], tokens[:, 1:]], dim=2)  # [B, n, 2W, D]: a block of keys and the one before it
    blocks = F.pad(query, (0, 0, 0, pad)).view(batch, heads, -1, window, width).transpose(1, 2)  # [B, n, H, W, D]
    local = torch.matmul(blocks, band.unsqueeze(2).transpose(-1, -2)) * scaling  # [B, n, H, W, 2W]
    count = local.shape[1]
    row = torch.arange(window, device=query.device).view(window, 1) + window
    column = torch.arange(2 * window, device=query.device)
    first = (torch.arange(count, device=query.device) == 0).view(count, 1, 1)
    seen = (column <= row) & (column > row - window) & ~(first & (column < window))  # [n, W, 2W]
    local = local.float().masked_fill(~seen.unsqueeze(1), float("-inf"))
    local = local.transpose(1, 2).reshape(batch, heads, -1, 2 * window)[:, :, :length]
    sink = s_aux.float().view(1, heads, 1, 1).expand(batch, heads, length, 1)
    compressed = key[:, 0, length:]  # [B, T, D]
    scores = [local, sink]
    if entries:
        far = torch.matmul(query, compressed.unsqueeze(1).transpose(-1, -2)) * scaling  # [B, H, S, T]
        scores.append(far.float() + attention_mask[..., -entries:].float())
    probabilities = torch.cat(scores, dim=-1).softmax(dim=-1)
    near, _, far = probabilities.split([2 * window, 1, entries], dim=-1)
    near = F.pad(near, (0, 0, 0, pad)).view(batch, heads, count, window, 2 * window).transpose(1, 2)
    output = torch.matmul(near.to(band.dtype), band.unsqueeze(2)).transpose(1, 2)
    output = output.reshape(batch, heads, -1, width)[:, :, :length]
    if entries:
        output = output + torch.matmul(far.to(compressed.dtype), compressed.unsqueeze(1))
    return output.transpose(1, 2).contiguous(), far.detach().sum(dim=1)


def dense_experts(module: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, times its routing weight: no host wait. hidden: [N, D]; indices, weights: [N, k]."""
    experts: Any = module  # a DeepseekV4Experts
    routed = torch.zeros(len(hidden), experts.num_experts, device=hidden.device, dtype=weights.dtype)
    routed = routed.scatter_add(1, indices, weights)  # [N, E]
    inner = experts._apply_gate(torch.einsum("nd,eid->eni", hidden, experts.gate_up_proj))
    inner = inner * routed.t().unsqueeze(-1).to(inner.dtype)
    return torch.einsum("eni,edi->nd", inner, experts.down_proj).to(hidden.dtype)


ALL_ATTENTION_FUNCTIONS.register(NAME, banded_attention)
ALL_EXPERTS_FUNCTIONS.register(NAME, dense_experts)
