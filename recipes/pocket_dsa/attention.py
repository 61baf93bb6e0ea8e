"""Attention to an indexer's picks through torch's fused kernels, as `pocket_dsa`; numbers agree with `eager`.

Asked for `rows`, it also says what those rows attend to, which the fused kernels do not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pocket_dsa"


def causal_mask(batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """What each token may see, [1, 1, S, S] bool, as DeepSeek-V3.2 takes it."""
    return {"indexed_attention": torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]}


def picked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    indices: Tensor,
    rows: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, Tensor | None]:
    """query, key: [B, H, S, D]; value: [B, H, S, V]; indices: [B, S, k], picked tokens; rows: [B, R].

    Returns the output [B, S, H, V] and the attention mass of each token summed over heads, [B, R, S] fp32, detached.
    """
    length = key.shape[2]
    if indices.shape[-1] >= length:
        seen = attention_mask.expand(len(query), -1, -1, -1)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        picked = torch.zeros(*indices.shape[:2], length, dtype=torch.bool, device=key.device)
        seen = picked.scatter_(-1, indices.long(), True)[:, None] & attention_mask
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    mass = None
    if rows is not None:
        with torch.no_grad():
            asked = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
            logits = (torch.matmul(asked, key.transpose(-1, -2)) * scaling).float()
            hidden = ~seen.gather(2, rows[:, None, :, None].expand(-1, -1, -1, length))
            mass = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1).sum(dim=1)
    return output.transpose(1, 2).contiguous(), mass


ALL_ATTENTION_FUNCTIONS.register(NAME, picked_attention)
