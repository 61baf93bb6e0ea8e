"""A KV cache that holds everything cold, in host memory, and attends only to the resident tokens."""

import copy

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


class ResidentLayer(DynamicLayer):
    """One full-attention layer, batch 1. keys, values: the resident tokens, [1, KV, R, d], in order of position.

    New tokens become resident and are copied to the cold side; `keep` chooses the resident ones anew. What is not
    resident takes no part in attention and no memory beside the model.
    """

    _layer_type = None  # or it would replace the stock class in every cache of the process

    def __init__(self) -> None:
        super().__init__()
        self._cold: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._cold = [*self._cold, (key_states.to("cpu"), value_states.to("cpu"))]
        self.length += key_states.shape[-2]
        return super().update(key_states, value_states)

    def keep(self, tokens: torch.Tensor) -> None:
        """Make exactly `tokens` ([R], ascending positions) resident, fetched from the cold side."""
        keys, values = (torch.cat(side, dim=-2) for side in zip(*self._cold, strict=True))
        self._cold = [(keys, values)]
        self.keys = keys[..., tokens, :].to(self.device)
        self.values = values[..., tokens, :].to(self.device)

    def resident_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All resident tokens lie before the new ones, so the mask is that of a shorter history."""
        resident = self.keys.shape[-2] if self.is_initialized else 0
        return resident + query_length, self.length - resident

    def reset(self) -> None:
        super().reset()
        self._cold, self.length = [], 0


class ResidentCache(DynamicCache):
    """A ResidentLayer for every full-attention layer; sliding-window layers keep their stock cache."""

    def __init__(self, config: PretrainedConfig, full_layers: list[int]) -> None:
        super().__init__(config=config)
        for layer in full_layers:
            self.layers[layer] = ResidentLayer()
        self.full_layers = full_layers

    def fork(self) -> "ResidentCache":
        """An independent continuation of the same history; tensors are shared until either side goes on."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    def keep(self, tokens: torch.Tensor) -> None:
        """Make exactly `tokens` resident in every full-attention layer: one resident set serves all."""
        for layer in self.full_layers:
            self.layers[layer].keep(tokens)

    def resident_bytes(self) -> int:
        """Bytes of resident keys and values of the full-attention layers."""
        return sum(self.layers[layer].resident_bytes() for layer in self.full_layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("a ResidentCache holds one sequence: beam search is not supported")
