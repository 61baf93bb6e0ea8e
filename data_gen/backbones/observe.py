"""Watch a Hugging Face decoder's full-attention layers at work, without copying model code.

Decoders look their attention function up in a registry on every call. While somebody observes, the registry hands out
a function that runs the original and reports what went in and out; results stay bit for bit the stock model's. Where
the cache answers with a list, one entry a sequence (eval/runtime/hosts/together.py), the original runs for each.

The registry is the process's, what is reported is not: an observation belongs to the thread that opened it, to its
model, and, where it names a cache, to the forwards that read into that cache. Others go by unseen, so that models,
threads and foreign forwards of an observed model get on side by side. However observations overlap, the registry is as
it was when the last one ends.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_gen.core.errors import InputError

_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value of one sequence, or of all where they share a tensor."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of one full-attention layer: S new tokens, T keys attended (past and new).

    hidden: [B, S, hidden], entering the attention block; query: [B, H, S, d] and key, value: [B, KV, T, d] after RoPE;
    cos, sin: rotary tables of the new tokens; output: [B, S, H, d], before the output projection; sequence: which one
    this is, where several with keys of their own are read at once (then B is 1).
    """

    layer: int
    module: nn.Module
    hidden: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    output: torch.Tensor
    sequence: int = 0

    def unrotated(self, states: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Undo RoPE on states [B, heads, R, d] of `rows` of the new tokens: the model's own rotation run backwards."""
        rotate = getattr(sys.modules[type(self.module).__module__], "apply_rotary_pos_emb", None)
        if rotate is None:
            raise InputError(f"{type(self.module).__name__} does not rotate with apply_rotary_pos_emb: not supported")
        cos, sin = self.cos[:, rows].float(), self.sin[:, rows].float()
        squared = cos**2 + sin**2  # above one where RoPE also scales (YaRN)
        states = states.float()
        content, _ = rotate(states, states[:, :0], cos / squared, -sin / squared)
        return content

    def new_keys(self) -> torch.Tensor:
        """Keys of the new tokens before RoPE, [B, KV, S, d] fp32."""
        return self.unrotated(self.key[:, :, -self.query.shape[2] :])


def context_of(model: PreTrainedModel) -> int:
    """Longest text in tokens. Raises InputError where the model's config does not say."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise InputError(f"{type(model).__name__}: its config says max_position_embeddings {found}, so how long a text "
                         "may be is not known")  # fmt: skip
    return found


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer index -> attention module of the full-attention layers; sliding-window layers are left out."""
    decoder = model.get_decoder()
    config: Any = model.config.get_text_config(decoder=True)
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise InputError(f"{type(model).__name__} is not a decoder with layers[i].self_attn: no adapter for it")
    window = getattr(config, "sliding_window", None)
    endless = window is not None and window >= context_of(model)  # a window that holds all there can be is none
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * len(layers)
    modules = {
        index: layer.self_attn
        for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
        if kind == "full_attention" or (kind == "sliding_attention" and endless)
    }
    if not modules:
        raise InputError(f"{type(model).__name__} has no full-attention layer: there is no long history to index")
    return modules


Extend = Callable[[int, int, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor] | None]
"""(layer, sequence, query [B, H, S, d], scaling) -> keys and values [B, KV, R, d] that all new tokens see too."""


@contextmanager
def observe(
    model: PreTrainedModel,
    observer: Callable[[AttentionCall], None],
    cache: object | None = None,
    extend: Extend | None = None,
) -> Iterator[None]:
    """Report calls of `model`'s full-attention layers to `observer` while the context is open.

    Reported are the calls of the thread that opened it; with `cache` only those of forwards that read into this one.
    extend: asked before each of them for more keys and values, which go in front of its own; None leaves it as it is.
    What is extended is of one new token, which sees everything: it has no mask.
    """
    watch = _Watch(attention_modules(model), observer, cache, extend)
    name: Any = model.config.get_text_config(decoder=True)._attn_implementation  # its key in the registry
    with _REGISTRY.tapped(name), _REGISTRY.told(watch):
        hooks = [module.register_forward_pre_hook(watch.enters, with_kwargs=True) for module in watch.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Watch:
    """One observation. layers: module -> layer index; inputs: of the calls at work, hidden states and rotary tables."""

    def __init__(
        self,
        modules: dict[int, nn.Module],
        observer: Callable[[AttentionCall], None],
        cache: object | None,
        extend: Extend | None,
    ) -> None:
        self.extend = extend
        self.layers = {module: layer for layer, module in modules.items()}
        self.observer, self.cache, self.thread = observer, cache, threading.get_ident()
        self.inputs: dict[nn.Module, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = {}

    def enters(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        """Before the attention block. kwargs: None for a thread in which the hook is being added or removed."""
        if threading.get_ident() != self.thread or kwargs is None:
            return
        self.inputs.pop(module, None)  # of a call that was broken off
        if self.cache is not None and kwargs.get("past_key_values") is not self.cache:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.inputs[module] = (hidden, kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1])

    def extends(self, module: Any, parts: list[_Part], masks: list[torch.Tensor | None], kwargs: dict) -> None:
        """Before the attention function, which is given parts and masks as they are left here."""
        if self.extend is None or threading.get_ident() != self.thread or module not in self.inputs:
            return
        for sequence, (query, key, value) in enumerate(parts):
            more = self.extend(self.layers[module], sequence, query, kwargs.get("scaling") or module.head_dim**-0.5)
            if more is not None:
                parts[sequence] = query, torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
                masks[sequence] = None

    def leaves(self, module: Any, parts: list[_Part], outputs: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        """Behind the attention function; outputs: one a part."""
        if threading.get_ident() != self.thread or module not in self.inputs:
            return
        hidden, (cos, sin) = self.inputs.pop(module)
        states = [hidden] if len(parts) == 1 else hidden.split(1)
        for sequence, (state, part, output) in enumerate(zip(states, parts, outputs, strict=True)):
            call = AttentionCall(
                self.layers[module], module, state, *part, cos, sin, kwargs.get("scaling") or module.head_dim**-0.5,
                kwargs.get("softcap"), kwargs.get("s_aux"), output, sequence,
            )  # fmt: skip
            self.observer(call)


class _Tap:
    """Stands in the registry for the attention function `name`; users: observations that need it there."""

    def __init__(self, name: str, watches: dict[nn.Module, tuple[_Watch, ...]]) -> None:
        self.original = ALL_ATTENTION_FUNCTIONS.get(name)
        self.watches, self.users = watches, 0

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | list[torch.Tensor],
        value: torch.Tensor | list[torch.Tensor],
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        forward = self.original or sys.modules[type(module).__module__].eager_attention_forward
        masks: list[torch.Tensor | None]
        if isinstance(key, list):  # each sequence sees all that its cache holds: no mask
            parts = list(zip(query.split(1), key, value, strict=True))
            masks = [None] * len(parts)
        else:
            parts, masks = [(query, key, cast(torch.Tensor, value))], [attention_mask]
        watches = self.watches.get(module, ())
        for watch in watches:
            watch.extends(module, parts, masks, kwargs)
        results = [forward(module, *part, mask, **kwargs) for part, mask in zip(parts, masks, strict=True)]
        for watch in watches:
            watch.leaves(module, parts, [output for output, _ in results], kwargs)
        return (torch.cat([output for output, _ in results]), None) if isinstance(key, list) else results[0]


class _Registry:
    """Counts who needs which tap, and tells taps who watches a module. Its tables change under a lock alone; calls read
    them without one, so an entry is replaced and never altered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taps: dict[str, _Tap] = {}
        self._watches: dict[nn.Module, tuple[_Watch, ...]] = {}

    @contextmanager
    def tapped(self, name: str) -> Iterator[None]:
        """The tap of `name` is in the registry while this is open."""
        functions = ALL_ATTENTION_FUNCTIONS
        # A name is replaced where it is found, so that a lookup in another thread always finds one of the two. `eager`
        # is in neither mapping: there a lookup that finds nothing falls back to it by itself.
        found = name not in functions._local_mapping and name in functions._global_mapping
        mapping = functions._global_mapping if found else functions._local_mapping
        with self._lock:
            if name not in self._taps:
                self._taps[name] = mapping[name] = _Tap(name, self._watches)
            tap = self._taps[name]
            tap.users += 1
        try:
            yield
        finally:
            with self._lock:
                tap.users -= 1
                if not tap.users:
                    del self._taps[name]
                    if mapping.get(name) is tap:  # else somebody else has replaced it since
                        if tap.original is None:
                            del mapping[name]
                        else:
                            mapping[name] = tap.original

    @contextmanager
    def told(self, watch: _Watch) -> Iterator[None]:
        """Taps report calls of the watched modules while this is open."""
        with self._lock:
            for module in watch.layers:
                self._watches[module] = (*self._watches.get(module, ()), watch)
        try:
            yield
        finally:
            with self._lock:
                for module in watch.layers:
                    left = tuple(other for other in self._watches[module] if other is not watch)
                    if left:
                        self._watches[module] = left
                    else:
                        del self._watches[module]


_REGISTRY = _Registry()
