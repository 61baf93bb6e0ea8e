"""Level 2 in plain torch: DeepSeek-V4's native selection and attention of one new token, over resident chunks only.

For the decode step of a serving engine, and the reference of `kernels/` score, topk and sparse_attention, which do the
same on a GPU; benchmarks/decode.py times both. Hugging Face models need neither: their own modules read resident rows.

The resident chunks of one layer lie in pages: index keys (data_gen.core.key_bytes) and attention entries
(eval.serving.entries) in the same slots, slot s being place s % page of page s // page. A page is 64 chunks, or 1 where
chunks are fetched one by one. The tensors given are views of one layer into a hot pool, pages of all layers or rows.
Each sequence brings the list of its slots; nothing else is read, so that what was evicted may hold anything.
"""

import torch

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE, SCALE_BYTES, decode_keys
from data_gen.core.tensors import lightning_scores
from eval.serving.entries import V4, EntryShape, decode_entries, gather_entries, gather_rows

NONE = -1
"""Stands for no chunk in a list of slots, anywhere in it: lists of different lengths share a tensor."""


def score_resident(
    query: torch.Tensor, weights: torch.Tensor, key_pages: torch.Tensor, slots: torch.Tensor, page: int = PAGE
) -> torch.Tensor:
    """Native logits sum_h w_h relu(q_h . k) of one token per sequence over its resident chunks, -inf without one.

    query: [B, H, d] after RoPE and Hadamard, as the keys are; weights: [B, H], already scaled by (H d)^-0.5;
    key_pages: [P, >= page (d + 4)] uint8; slots: [B, R] -> [B, R] fp32. Raises InputError on damaged keys.
    """
    scores = torch.full(slots.shape, -torch.inf, device=query.device)
    for sequence, listed in enumerate(slots.long()):
        keys = decode_keys(gather_rows(key_pages, listed[listed != NONE], query.shape[-1], SCALE_BYTES, page))
        one = slice(sequence, sequence + 1)
        scores[sequence, listed != NONE] = lightning_scores(query[one].float(), weights[one].float(), keys)[0]
    return scores


def select_resident(scores: torch.Tensor, slots: torch.Tensor, k: int) -> torch.Tensor:
    """The slots of the k best scores of each sequence, in the order of the list, then NONE: [B, R], [B, R] -> [B, k].

    Of equal scores those that are listed first win; -inf never does. Raises InputError on NaN.
    """
    if bool(scores.isnan().any()):
        raise InputError("select_resident: a score is NaN; the queries or the keys are damaged")
    places = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.masked_fill(scores.gather(1, places) == -torch.inf, scores.shape[1]).sort(dim=1).values
    places = torch.nn.functional.pad(places, (0, k - places.shape[1]), value=scores.shape[1])
    return torch.nn.functional.pad(slots, (0, 1), value=NONE).gather(1, places)


def attend(
    query: torch.Tensor,
    entry_pages: torch.Tensor,
    chosen: torch.Tensor,
    window_pages: torch.Tensor,
    window: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    shape: EntryShape = V4,
    page: int = PAGE,
) -> torch.Tensor:
    """One softmax over chosen chunks, sliding window and sink; an entry is key and value of every head.

    query: [B, H, D] after RoPE; entry_pages: [P, >= page * bytes] uint8, chosen: [B, k] slots there; window_pages:
    [P, >= 64 * bytes], always pages of 64, window: [B, W] slots there; sinks: [H] logits that take weight and bring
    nothing; scale: of the other logits, D^-0.5 -> [B, H, D] in the query's dtype, its last `rope` values still turned
    by the entries' positions. Raises InputError on damaged entries.
    """
    out = torch.empty_like(query)
    for sequence, (near, far) in enumerate(zip(window.long(), chosen.long(), strict=True)):
        rows = [
            gather_entries(entry_pages, far[far != NONE], shape, page),
            gather_entries(window_pages, near[near != NONE], shape),
        ]
        entries = decode_entries(torch.cat(rows), shape)
        logits = scale * query[sequence].float() @ entries.T
        weights = torch.softmax(torch.cat([logits, sinks.float().unsqueeze(1)], dim=1), dim=1)
        out[sequence] = weights[:, :-1] @ entries
    return out
