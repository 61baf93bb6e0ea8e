"""A decoder with ordinary attention as host, whose tokens are read by one step that a GPU replays as a CUDA graph."""

import copy
from collections.abc import Sequence
from functools import partial, wraps
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from data_gen.backbones.families import family_of
from data_gen.backbones.layers import decoder_of
from data_gen.core.errors import InputError
from eval.runtime.correction import Correction
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dense_cache import ResidentCache, ResidentLayer
from eval.runtime.hosts.step import TURNS, DecodeStep

SPAN = 1024
"""Rows of a step are a multiple of it: another number of them is another graph."""


class GraphCache(ResidentCache):
    """A ResidentCache whose rows lie in a step's memory while tokens are read one by one.

    Whatever else looks at the rows has `settle` hand back first what was read.
    """

    def _forget(self) -> None:
        super()._forget()
        self._step: DecodeStep | None = None
        self._taken: int | None = None  # tokens read when the step took the rows, None while it does not have them

    def read(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The logits [B, vocabulary] after tokens [B, 1]. Raises InputError as DecodeStep."""
        position, step = self.get_seq_length(), self._step
        since = None if self._taken is None else position - self._taken
        if step is None or since is None or since == TURNS or step.taken + since == step.rows:
            self.settle()
            step = self._step = self._fitting()
            step.take(self)
            self._taken, since = position, 0
        logits = step.read(model, ids, position, step.taken + since)
        for layer in self.layers:
            if isinstance(layer, ResidentLayer):
                layer.length += 1
            elif isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length += 1
        self.newest.update(step.newest)
        return logits

    def _fitting(self) -> DecodeStep:
        """The step that there is, or another one where this has too few rows, or far too many."""
        rows = self.full[0].rows
        enough = -(-(rows + TURNS) // SPAN) * SPAN
        if self._step is not None and rows < self._step.rows <= 2 * enough:
            return self._step
        return DecodeStep(self, enough)

    def settle(self) -> None:
        """Take the rows back from the step."""
        if self._taken is not None:
            tokens, self._taken = self.get_seq_length() - self._taken, None
            assert self._step is not None
            self._step.give_back(self, tokens)

    def stage(self) -> None:
        self.settle()
        super().stage()

    def chunk_keys(self, layers: Sequence[int]) -> torch.Tensor:
        self.settle()
        return super().chunk_keys(layers)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.settle()
        super().reorder_cache(beam_idx)
        self._step = None


class GraphHost(DenseHost):
    """A model and one batch of sequences that it decodes (see `Host`).

    Several tokens are read as DenseHost does, a single one by a step: on a GPU one CUDA graph, captured again where the
    resident set has outgrown its memory. Raises InputError, by name, for a DeepSeek-V4 and models with DSA or MLA, for
    layers of other kinds, several devices, rotary frequencies that follow the length, attention that takes no mask, and
    for a correction.

    model: a copy of the one given, which shares all of its modules and reads into `cache` by the step.
    """

    cache: GraphCache
    holds = GraphCache

    def __init__(
        self,
        model: PreTrainedModel,
        chunk_tokens: int,
        layers: Sequence[int],
        pageable: bool | None = None,
        correction: Correction | None = None,
    ) -> None:
        if family_of(model) != "dense":
            raise _refused(model, "its attention picks among the resident tokens at every step")
        super().__init__(model, chunk_tokens, layers, pageable, correction)
        self._check(model)
        self._stock = model
        # The model given stays as it is: other hosts of it may be reading in other threads.
        self.model = copy.copy(model)
        self.model.forward = wraps(model.forward)(partial(self._forward))

    def _check(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config(decoder=True)
        implementation: str = config._attn_implementation
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        held = {type(layer) for layer in self.cache.layers} - {ResidentLayer, DynamicSlidingWindowLayer}
        if self.cache.correction is not None:
            raise _refused(model, "a correction adds other chunks at every step")
        if self.latent:
            raise _refused(model, "it caches latents (MLA)")
        if kinds := kinds | {kind.__name__ for kind in held}:
            raise _refused(
                model, f"it has layers beside full and sliding-window attention ({', '.join(sorted(kinds))})"
            )
        if len(self.cache.layers) != len(decoder_of(model).layers):
            raise _refused(model, "its layers share what they cache")
        if self.one_thread:
            raise _refused(model, "its rotary frequencies depend on the length of the text")
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise _refused(model, "it lies on several devices")
        if implementation not in ("sdpa", "eager"):
            raise _refused(model, f"attention `{implementation}` takes no mask; or load it with sdpa")

    def fork(self) -> NoReturn:
        """Refused: the memory of a step serves one history."""
        raise InputError("graph: a host with a step holds one history and has no forks; open one without graph")

    def _enters(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is not None and kwargs.get("past_key_values") is self.cache:
            self.cache.settle()
        super()._enters(module, args, kwargs)

    def _forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own forward, but for the next token of sequences that were begun."""
        begun = self.cache.batch > 0 and kwargs.get("past_key_values") is self.cache
        if not begun or input_ids is None or input_ids.shape[1] > 1:
            return self._stock.forward(input_ids, **kwargs)
        logits = self.cache.read(self._stock, input_ids)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self.cache)


def _refused(model: PreTrainedModel, why: str) -> InputError:
    return InputError(f"graph: {type(model).__name__} is not read by a captured step: {why}; leave graph out")
