"""Page selection at every step, in the manner of Quest (arXiv 2406.10774), with all of the history on the host.

A page of a layer's KV head is ranked by the highest product that any key within the page's bounds, the lowest and
highest value of each channel, could have with the current query; the best pages are fetched, those of the step before
stay where they are. Of query heads that share a KV head the highest bound counts: their pages are the same bytes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = "quest"


class PagedLayer(DynamicLayer):
    """One layer's history: complete pages on the host; their bounds, the chosen and the unfinished one on the device.

    keys, values: [1, KV, T, d] of what was read so far; page: tokens; count: pages that a KV head holds at once, all
    of them where there are no more; room: tokens that will follow. host: [KV, pages, page, 2d]; fetched: pages of one
    KV head that were copied from the host. What prefill leaves on the device are the newest pages.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, page: int, count: int, room: int) -> None:
        super().__init__()
        rows = torch.cat([keys[0], values[0]], dim=-1)  # [KV, T, 2d]
        heads, tokens, width = rows.shape
        self.page, self.count, self.length, self.fetched, self.is_initialized = page, count, tokens, 0, True
        whole = tokens // page
        pages = rows[:, : whole * page].unflatten(1, (whole, page))
        self.host = torch.empty((heads, (tokens + room) // page + 1, page, width), dtype=rows.dtype)
        if rows.is_cuda:
            self.host = self.host.pin_memory()
        self.host[:, :whole] = pages
        self.tail = rows[:, whole * page :].clone()
        self.low, self.high = _bounds(pages)
        self.held = torch.arange(whole - min(count, whole), whole, device=rows.device).expand(heads, -1)
        self.hot = pages[:, whole - min(count, whole) :].clone()

    def get_seq_length(self) -> int:
        """Tokens read."""
        return self.length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take in one token's key and value; what `attend` is given in the place of keys and values is the layer."""
        self.tail = torch.cat([self.tail, torch.cat([key_states[0], value_states[0]], dim=-1)], dim=1)
        self.length += 1
        if self.tail.shape[1] == self.page:
            low, high = _bounds(self.tail[:, None])
            self.host[:, self.low.shape[1]] = self.tail
            self.low, self.high = torch.cat([self.low, low], dim=1), torch.cat([self.high, high], dim=1)
            self.tail = self.tail[:, :0]
        return self, self

    def choose(self, query: torch.Tensor) -> torch.Tensor:
        """The best pages of each KV head for a query [H, d]: ids [KV, count], ascending."""
        grouped = query.unflatten(0, (len(self.low), -1))  # [KV, G, d]
        highest = grouped.clamp(min=0) @ self.high.transpose(1, 2) + grouped.clamp(max=0) @ self.low.transpose(1, 2)
        return highest.amax(dim=1).topk(min(self.count, self.low.shape[1]), dim=1).indices.sort(dim=1).values

    def fetch(self, chosen: torch.Tensor) -> None:
        """Make these pages [KV, count] the ones on the device."""
        same = chosen[:, :, None] == self.held[:, None, :]
        hot = self.hot[torch.arange(len(chosen), device=chosen.device)[:, None], same.int().argmax(dim=2)]
        head, place = (~same.any(dim=2)).nonzero(as_tuple=True)
        hot[head, place] = self.host[head.cpu(), chosen[head, place].cpu()].to(hot.device)
        self.held, self.hot = chosen, hot
        self.fetched += len(head)

    def resident(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values on the device, [KV, tokens, d] each."""
        rows = torch.cat([self.hot.flatten(1, 2), self.tail], dim=1)
        keys, values = rows.chunk(2, dim=-1)
        return keys, values

    @property
    def page_bytes(self) -> int:
        """Of one page of one KV head."""
        return self.host[0, 0].nbytes


def _bounds(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest key of pages [KV, P, page, 2d], [KV, P, d] each."""
    keys = pages[..., : pages.shape[-1] // 2]
    return keys.amin(dim=2), keys.amax(dim=2)


def attend(module: nn.Module, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """The attention function of one step: paged layers choose and fetch, other layers attend as they always do.

    query: [1, H, 1, d]. Returns ([1, 1, H, d], None).
    """
    if not isinstance(key, PagedLayer):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    key.fetch(key.choose(query[0, :, 0]))
    keys, values = key.resident()
    scale = kwargs.get("scaling")
    output = nn.functional.scaled_dot_product_attention(query, keys[None], values[None], scale=scale, enable_gqa=True)
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, attend)


@contextmanager
def paged(
    model: PreTrainedModel, cache: Cache, layers: Sequence[int], page: int, share: float, room: int, dense: int = 2
) -> Iterator[list[PagedLayer]]:
    """Turn a stock cache, which has read a prompt, into a paged one while the context lasts; yields its paged layers.

    layers: those that attend to all of the history; page: tokens; share: of their keys and values that may be on the
    device, together with the first `dense` of them, which are not paged as in Quest; room: tokens that will be read.
    Raises ValueError where the dense layers alone hold more than that.
    """
    held: list[Any] = cache.layers
    tokens = held[layers[0]].get_seq_length()
    left = (share * len(layers) - dense) * tokens / max(1, len(layers) - dense)  # tokens of a paged layer
    count = round((left - tokens % page) / page)
    if count < 1 or dense >= len(layers):
        raise ValueError(
            f"{share:.0%} of the KV cache does not hold a page beside {dense} of {len(layers)} whole layers"
        )
    found: list[PagedLayer] = []
    for layer in layers[dense:]:
        found.append(PagedLayer(held[layer].keys, held[layer].values, page, count, room))
        held[layer] = found[-1]
    before: Any = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield found
    finally:
        model.set_attn_implementation(before)
