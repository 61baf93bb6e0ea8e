"""One decoding step in memory that never moves, so that a GPU may replay it as one CUDA graph.

The step is the model's own forward pass for one token of each sequence. What a graph would freeze lies in tensors of
the device instead: the token, its position, the row that it takes, which rows are seen. A full-attention layer has rows
for the resident set and for tokens to come, those of no token hidden; a sliding-window layer has a ring of its window.
On a CPU the same step runs without a graph.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from data_gen.backbones.layers import decoder_of
from data_gen.backbones.observe import AttentionCall, observe
from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from eval.runtime.hosts.dense_cache import ResidentCache
from eval.runtime.hosts.resident import PAD

TURNS = 128
"""Tokens that are read before what they brought is handed back to the cache."""

_CAPTURING = threading.Lock()
"""torch captures on one stream, whatever the thread."""


class StepLayer(StaticLayer):
    """Rows of one layer. keys, values: [B, KV, rows, d]; place: [1] int64, the row that the new token takes."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: int, place: torch.Tensor) -> None:
        super().__init__(rows)
        # Hidden rows count for nothing only while they are finite.
        self.keys, self.values = (held.new_zeros(*held.shape[:2], rows, held.shape[3]) for held in (keys, values))
        self.place, self.is_initialized = place, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = cast(torch.Tensor, self.keys), cast(torch.Tensor, self.values)
        return keys.index_copy_(2, self.place, key_states), values.index_copy_(2, self.place, value_states)

    def get_seq_length(self) -> int:
        raise InputError("a step that asks for the length of its cache cannot be replayed: leave graph out")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise InputError("a step that makes masks of its own cannot be replayed: leave graph out")


class DecodeStep(Cache):
    """Reads one token of each sequence of a ResidentCache; it is what the model takes for its cache.

    rows: of each full-attention layer; taken: rows of the resident set and the tokens since, at the newest `take`;
    content: observed layer -> what chunk keys are made of, [B, KV, TURNS, d] fp32, of the newest tokens; newest: as
    `ResidentCache.newest`.
    """

    def __init__(self, cache: ResidentCache, rows: int) -> None:
        keys = cast(torch.Tensor, cache.full[0].keys)
        device, self.rows, self.taken = keys.device, rows, 0
        self.windows = {
            place: layer.sliding_window
            for place, layer in enumerate(cache.layers)
            if isinstance(layer, DynamicSlidingWindowLayer)
        }
        self.ids = torch.zeros(len(keys), 1, dtype=torch.int64, device=device)
        self.position, self.row = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self.rings = {window: torch.zeros_like(self.row) for window in self.windows.values()}
        self.empty = torch.zeros(len(keys), rows, dtype=torch.bool, device=device)
        layers: list[Any] = []
        for place, layer in enumerate(cast(list[DynamicLayer], cache.layers)):
            window = self.windows.get(place)
            own = (rows, self.row) if window is None else (window, self.rings[window])
            layers.append(StepLayer(cast(torch.Tensor, layer.keys), cast(torch.Tensor, layer.values), *own))
        super().__init__(layers=layers)
        self.content = {
            layer: pooler.pooled.new_zeros(*pooler.pooled.shape[:2], TURNS, pooler.pooled.shape[3])
            for layer, pooler in cache.pooled.items()
        }
        self.newest = {layer: torch.zeros_like(state) for layer, state in cache.newest.items()}
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, cache: ResidentCache) -> None:
        """Lay what the cache holds into the rows here; its full-attention layers go on in them."""
        self.taken = cache.full[0].rows
        for place, layer in zip(cache.full_layers, cache.full, strict=True):
            layer.move_into(self._sides(place))
        for place, window in self.windows.items():
            held = cast(DynamicSlidingWindowLayer, cache.layers[place])
            last = self._last(held.cumulative_length, min(held.cumulative_length, window - 1)) % window
            for name, side in self._sides(place).items():
                side[:, :, last] = getattr(held, name)
        self.empty.zero_()
        kept = (cache.table.kept == PAD).to(self.empty.device).repeat_interleave(cache.chunk_tokens, dim=1)
        self.empty[:, : kept.shape[1]] = kept

    def give_back(self, cache: ResidentCache, tokens: int) -> None:
        """Let the cache hold what the newest `tokens` tokens brought, at most TURNS since they were taken."""
        for layer in cache.full:
            layer.see(self.taken + tokens)
        for place, window in self.windows.items():
            held = cast(DynamicSlidingWindowLayer, cache.layers[place])
            last = self._last(held.cumulative_length, min(held.cumulative_length, window - 1)) % window
            for name, side in self._sides(place).items():
                setattr(held, name, side[:, :, last])
        turns = self._last(cache.get_seq_length(), tokens) % TURNS
        for layer, pooler in cache.pooled.items():
            pooler.append(self.content[layer][:, :, turns])

    def _sides(self, place: int) -> dict[str, torch.Tensor]:
        """The rows of a layer by the names that the cache's own layers have for them."""
        own = cast(StepLayer, self.layers[place])
        return {"keys": cast(torch.Tensor, own.keys), "values": cast(torch.Tensor, own.values)}

    def _last(self, length: int, count: int) -> torch.Tensor:
        """Positions of the newest `count` of `length` tokens, [count] int64."""
        return torch.arange(length - count, length, device=self.row.device)

    def read(self, model: PreTrainedModel, ids: torch.Tensor, position: int, row: int) -> torch.Tensor:
        """The logits [B, vocabulary] after tokens [B, 1], which take a row at a position.

        Raises InputError for a model whose step cannot be captured.
        """
        self.ids.copy_(ids)
        self.position.fill_(position)
        self.row.fill_(row)
        if not self.ids.is_cuda:
            return self._run(model)
        with torch.cuda.device(self.ids.device):
            if self._graph is None:
                self._graph = self._captured(model)
            self._graph.replay()
        return self._logits.clone()  # the next step writes over them

    def _captured(self, model: PreTrainedModel) -> torch.cuda.CUDAGraph:
        graph, side, now = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        with _CAPTURING:
            side.wait_stream(now)
            with torch.cuda.stream(side):  # what libraries set up at their first call must not be in the graph
                for _ in range(2):
                    self._run(model)
            now.wait_stream(side)
            try:
                # Other threads may wait for the device, or fetch, meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._logits = self._run(model)
            except RuntimeError as error:
                raise InputError(
                    f"{type(model).__name__}: its step cannot be captured as a CUDA graph ({one_line(error)}); leave "
                    "graph out"
                ) from error
        return graph

    def _run(self, model: PreTrainedModel) -> torch.Tensor:
        for window, place in self.rings.items():
            place.copy_(self.position % window)
        self._turn = self.position % TURNS
        full = _added((self._last(self.rows, self.rows) <= self.row) & ~self.empty, model.dtype)
        rings = {
            window: _added((self._last(window, window) <= self.position)[None], model.dtype) for window in self.rings
        }
        masks = [rings[self.windows[place]] if place in self.windows else full for place in range(len(self.layers))]
        with self._watched(model, masks):
            return model(
                self.ids,
                attention_mask=full,
                position_ids=self.position.expand(len(self.ids), 1),
                past_key_values=self,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    @contextmanager
    def _watched(self, model: PreTrainedModel, masks: Sequence[torch.Tensor]) -> Iterator[None]:
        """Each layer sees the rows that it has, and what observed ones were asked is noted."""

        def see(mask: torch.Tensor, module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
            # kwargs: None for a thread in which the hook is being added or removed.
            if kwargs is None or kwargs.get("past_key_values") is not self:
                return None
            return args, kwargs | {"attention_mask": mask}

        with ExitStack() as stack:
            stack.enter_context(observe(model, self._note, self))
            for layer, mask in zip(decoder_of(model).layers, masks, strict=True):
                hook = layer.self_attn.register_forward_pre_hook(partial(see, mask), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _note(self, call: AttentionCall) -> None:
        if call.layer in self.content:
            self.content[call.layer].index_copy_(2, self._turn, call.new_keys())
            self.newest[call.layer].copy_(call.hidden[:, -1])


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask [B, 1, 1, rows] that every attention of transformers takes, added to the logits. seen: [B, rows] bool."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
    return mask[:, None, None]
