"""Watch a Hugging Face decoder's full-attention layers at work, without copying model code.

Decoders look their attention function up in a registry on every call. While `observe` is active the registry hands out
a function that runs the original and reports what went in and out; results stay bit for bit the stock model's. Where
the cache answers with a list, one entry a sequence (eval/runtime/hosts/together.py), the original runs for each.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_gen.core.errors import InputError


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


@contextmanager
def observe(model: PreTrainedModel, observer: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Report every call of `model`'s full-attention layers to `observer` while the context is open."""
    layers = {module: layer for layer, module in attention_modules(model).items()}
    inputs: dict[nn.Module, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        inputs[module] = (hidden, kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1])

    name = model.config.get_text_config(decoder=True)._attn_implementation
    earlier = ALL_ATTENTION_FUNCTIONS.get(name)

    def attention(
        module: Any,
        query: torch.Tensor,
        key: Any,  # [B, KV, T, d], or a list of them
        value: Any,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        forward = earlier or sys.modules[type(module).__module__].eager_attention_forward
        several = isinstance(key, list)
        parts = list(zip(query.split(1), key, value, strict=True)) if several else [(query, key, value)]
        results = [forward(module, *part, None if several else attention_mask, **kwargs) for part in parts]
        if module in layers:
            hidden, (cos, sin) = inputs.pop(module)
            states = hidden.split(1) if several else [hidden]
            for sequence, (state, part, (output, _)) in enumerate(zip(states, parts, results, strict=True)):
                call = AttentionCall(
                    layers[module], module, state, *part, cos, sin, kwargs.get("scaling") or module.head_dim**-0.5,
                    kwargs.get("softcap"), kwargs.get("s_aux"), output, sequence,
                )  # fmt: skip
                observer(call)
        return (torch.cat([output for output, _ in results]), None) if several else results[0]

    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in layers]
    overridden = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        if overridden is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = overridden
        for hook in hooks:
            hook.remove()
