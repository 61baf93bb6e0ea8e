"""Which layers of a Hugging Face decoder look back at all of the history, and how far it reads.

Layers are counted as the cache counts them: each attention block is one, also where a decoder layer holds two.
"""

import hashlib
import inspect
import json
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from data_gen.core.errors import InputError
from data_gen.core.fingerprint import APART

LONGEST = 1 << 31
"""Tokens: places of more are a slip of the pen, and no count of them fits where counts are kept."""


def context_of(model: PreTrainedModel) -> int:
    """Longest text in tokens. Raises InputError where the model's config does not say."""
    return longest_text(model.config, type(model).__name__)


def longest_text(config: PretrainedConfig, name: str) -> int:
    """`context_of` a config alone, which raises the same InputError; name: what the error calls its model."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(found, int) or not 1 <= found < LONGEST:
        raise InputError(f"{name}: its config says max_position_embeddings {found}, so its longest context is "
                         "unknown")  # fmt: skip
    return found


NO_SETTINGS = {"architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"}
"""What a configuration says besides how its model computes; and which tokens begin and end a text (`*_token_id`)."""


def config_digest(model: PreTrainedModel) -> str:
    """Sixteen hexadecimal digits for what a model's configuration sets otherwise than by default.

    Weights alone do not say how they are used: the base of RoPE, an epsilon or a scale makes other traces.
    """
    said = model.config.get_text_config(decoder=True).to_diff_dict()
    kept = {name: value for name, value in said.items() if name not in NO_SETTINGS and not name.endswith("token_id")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


FULL = ("full_attention", "indexed_attention")
"""Kinds of layers that look back at all of the history, or at what an indexer picks of all of it."""


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of layers: what `get_decoder` gives, or where that is the model itself (Llama-4) what lies in it."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Layer index -> attention module of the full-attention layers; sliding-window layers are left out.

    Raises InputError for a model without any, or whose layers have no `self_attn`.
    """
    decoder = decoder_of(model)
    config: Any = model.config.get_text_config(decoder=True)
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise _attention_elsewhere(model, "", decoder)
    window = getattr(config, "sliding_window", None)
    endless = window is not None and window >= context_of(model)  # a window that holds all there can be is none
    kinds = getattr(config, "layer_types", None)
    attentions = [(index, block) for index, layer in enumerate(layers) for block in _blocks(layer)]
    if kinds is None:
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * len(attentions)
    found = {}
    for place, ((index, block), kind) in enumerate(zip(attentions, kinds, strict=True)):
        if kind in FULL or (kind == "sliding_attention" and endless):
            if not isinstance(block, nn.Module):
                raise _attention_elsewhere(model, f"layers.{index}", layers[index])
            found[place] = block
    if not found:
        others = ", ".join(sorted(set(kinds)))
        raise InputError(f"{type(model).__name__}: no adapter for its layers, of kind {others}")
    return found


def _blocks(layer: nn.Module) -> list[Any]:
    """The attention blocks of a decoder layer, in the order in which they are run: a list of them, or one, or None."""
    found = getattr(layer, "self_attn", None)
    return list(found) if isinstance(found, nn.ModuleList) else [found]


def _attention_elsewhere(model: PreTrainedModel, place: str, part: nn.Module) -> InputError:
    """Of a decoder without layers[i].self_attn: where its attention lies, and what it adds or attends to. part: what
    would hold it, at `place`; else all of the model is looked through."""
    modules = (pair for whole, at in ((part, place), (model, "")) for pair in whole.named_modules(prefix=at))
    named = ((name, module) for name, module in modules if "Attention" in type(module).__name__)
    name, attention = next((pair for pair in named if pair[0] != place and not APART.search(pair[0])), ("", None))
    if attention is None:
        return InputError(f"{type(model).__name__}: no module of it is called an attention")
    config: Any = model.config.get_text_config(decoder=True)
    found = f"{name} ({type(attention).__name__})"
    if "Cross" in type(attention).__name__:
        return InputError(f"{type(model).__name__}: {found} attends to another input: no adapter for it")
    taken = inspect.signature(attention.forward).parameters
    bias = next((each for each in ("alibi", "position_bias") if each in taken and getattr(config, "alibi", True)), None)
    return InputError(
        f"{type(model).__name__}: its attention lies in {found}, not in layers[i].self_attn"
        + (f", and adds a bias by distance ({bias})" if bias else "")
    )


def caches_latents(model: PreTrainedModel) -> bool:
    """Whether its full-attention layers cache latents, of which each head makes its keys and values (MLA)."""
    return any(hasattr(module, "expand_kv") for module in attention_modules(model).values())
