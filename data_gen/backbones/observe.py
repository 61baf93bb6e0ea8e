"""Watch a Hugging Face decoder's full-attention layers at work, without copying model code.

Decoders look their attention function up in a registry on every call. While somebody observes, the registry hands out
a function that runs the original and reports what went in and out; results stay bit for bit the stock model's. Where
the cache answers with a list, one entry a sequence (eval/runtime/hosts/together.py), the original runs for each.

The registry is the process's, what is reported is not: an observation belongs to the thread that opened it, to its
model, and, where it names a cache, to the forwards that read into that cache. Others go by unseen, so that models,
threads and foreign forwards of an observed model get on side by side. However observations overlap, the registry is as
it was when the last one ends.
"""

import inspect
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

from data_gen.backbones.layers import attention_modules
from data_gen.core.errors import InputError

_States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value of one sequence, or of all where they share a tensor."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of one full-attention layer: S new tokens, T keys attended (past and new).

    hidden: [B, S, hidden], entering the attention block; query: [B, H, S, d] and key, value: [B, KV, T, d] after RoPE;
    given: what else the block was called with; output: [B, S, H, d], before the output projection; sequence: which one
    this is, where several with keys of their own are read at once (then B is 1).
    """

    layer: int
    module: nn.Module
    hidden: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    given: dict[str, Any]
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    output: torch.Tensor
    sequence: int = 0

    def content(self) -> "Content":
        """What the block makes of the new tokens before RoPE: all of it, up to the attention function."""
        return run_again(self, self.hidden, turned=False)

    def new_keys(self) -> torch.Tensor:
        """What the layer caches of the new tokens before RoPE, [B, KV, S, d] fp32: keys, or with MLA the latent."""
        return run_again(self, self.hidden, turned=False, whole=False).cached.float()


@dataclass(frozen=True)
class Content:
    """What an attention block made of S tokens without a past. cached: the first of what it caches, [B, KV, S, c];
    query, key: as its attention function got them, [B, H, S, d] and [B, KV, S, d], None where it was not reached."""

    cached: torch.Tensor
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None


class _Made(Exception):
    """Ends a block that is run again once it has made what was wanted."""


class _Note:
    """Stands for the cache of a block that is run again: it keeps nothing, and notes what it is given.

    whole: go on after it, to the attention function.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.cached: torch.Tensor | None = None
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None

    def update(
        self, first: torch.Tensor, second: torch.Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cached = first
        if not self.whole:
            raise _Made
        return first, second

    def update_indexer(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        return keys

    def get_seq_length(self, *args: object) -> int:
        return 0


_AGAIN = threading.local()
"""note: of the block that is run again in this thread."""


def run_again(call: AttentionCall, hidden: torch.Tensor, turned: bool, whole: bool = True) -> Content:
    """Run a call's attention block on hidden states [B, S, hidden] at the call's positions, without a past.

    turned: by the call's rotary tables, else by tables that turn nothing; whole: up to the attention function, else to
    the cache. The block's own code makes its keys, whatever part of them it turns, or none. Raises InputError for a
    block that caches nothing, that attends to keys of another one, or whose rotary tables are of an unknown kind.
    """
    given = {name: value for name, value in call.given.items() if name not in ("hidden_states", *CACHE_NAMES)}
    if not turned and (tables := given.get("position_embeddings")) is not None:
        given["position_embeddings"] = _still(tables, f"layer {call.layer}")
    note = _Note(whole)
    cache = next((name for name in CACHE_NAMES if name in call.given), CACHE_NAMES[0])
    module: Any = call.module
    _AGAIN.note = note
    try:
        with _REGISTRY.tapped(module.config._attn_implementation):
            module.forward(hidden_states=hidden, **given, **{cache: note})
    except _Made:
        if note.cached is None:  # what its attention function was given is not its own
            raise InputError(f"layer {call.layer} takes the keys of an earlier one") from None
        return Content(note.cached, note.query, note.key)
    finally:
        _AGAIN.note = None
    raise InputError(f"layer {call.layer}: {type(call.module).__name__} caches nothing that could be kept or fetched")


CACHE_NAMES = ("past_key_values", "past_key_value")
"""What attention blocks call their cache."""


def _still(tables: Any, where: str) -> Any:
    """Rotary tables that turn nothing, of the shape of others."""
    if isinstance(tables, torch.Tensor) and tables.is_complex():
        return torch.ones_like(tables)
    if isinstance(tables, tuple) and len(tables) == 2 and all(isinstance(table, torch.Tensor) for table in tables):
        return torch.ones_like(tables[0]), torch.zeros_like(tables[1])
    raise InputError(
        f"{where}: its rotary tables are neither (cos, sin) nor complex, so keys without positions cannot be computed"
    )


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
    watch = _AttentionWatch(attention_modules(model), observer, cache, extend)
    name: Any = model.config.get_text_config(decoder=True)._attn_implementation  # its key in the registry
    with _REGISTRY.tapped(name), _REGISTRY.told(watch):
        hooks = [module.register_forward_pre_hook(watch.enters, with_kwargs=True) for module in watch.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _AttentionWatch:
    """One observation. layers: module -> layer index; inputs: of the calls at work, hidden states and all arguments."""

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
        self.inputs: dict[nn.Module, dict[str, Any]] = {}

    def enters(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        """Before the attention block. kwargs: None for a thread in which the hook is being added or removed."""
        if threading.get_ident() != self.thread or kwargs is None:
            return
        self.inputs.pop(module, None)  # of a call that was broken off
        if self.cache is not None and kwargs.get("past_key_values") is not self.cache:
            return
        names = inspect.signature(module.forward).parameters if args else ()
        self.inputs[module] = dict(zip(names, args, strict=False)) | kwargs

    def extends(self, module: Any, parts: list[_States], masks: list[torch.Tensor | None], kwargs: dict) -> None:
        """Before the attention function, which is given parts and masks as they are left here."""
        if self.extend is None or threading.get_ident() != self.thread or module not in self.inputs:
            return
        for sequence, (query, key, value) in enumerate(parts):
            more = self.extend(self.layers[module], sequence, query, kwargs.get("scaling") or module.head_dim**-0.5)
            if more is not None:
                parts[sequence] = query, torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
                masks[sequence] = None

    def leaves(self, module: Any, parts: list[_States], outputs: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
        """After the attention function; outputs: one per part."""
        if threading.get_ident() != self.thread or module not in self.inputs:
            return
        given = self.inputs.pop(module)
        hidden = given["hidden_states"]
        given |= {name: None for name in CACHE_NAMES if name in given}  # whoever keeps a call keeps no cache by it
        states = [hidden] if len(parts) == 1 else hidden.split(1)
        for sequence, (state, part, output) in enumerate(zip(states, parts, outputs, strict=True)):
            call = AttentionCall(
                self.layers[module], module, state, *part, given, kwargs.get("scaling") or module.head_dim**-0.5,
                kwargs.get("softcap"), kwargs.get("s_aux"), output, sequence,
            )  # fmt: skip
            self.observer(call)


class _Tap:
    """Stands in the registry for the attention function `name`; users: observations that need it there."""

    def __init__(self, name: str, watches: dict[nn.Module, tuple[_AttentionWatch, ...]]) -> None:
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
        if (note := getattr(_AGAIN, "note", None)) is not None:  # the block is run again for what it gives us here
            note.query, note.key = query, cast(torch.Tensor, key)
            raise _Made
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
        self._watches: dict[nn.Module, tuple[_AttentionWatch, ...]] = {}

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
    def told(self, watch: _AttentionWatch) -> Iterator[None]:
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
