"""What the stock lightning indexers compute, written out: their parts as hooks see them, turned and multiplied here."""

import inspect
from contextlib import ExitStack

import torch

from data_gen.backbones.dsa_hooks import indexers

HALVES = {"deepseek_v32", "axk2", "hy_v4"}
"""Families that turn one half of the dims against the other, where the rest turn neighbours."""
LAST = {"hy_v4"}
"""Families that turn the last dims, where the rest turn the first."""


def stock_parts(model, tokens):
    """(layer, part) -> what the stock indexer computed on the way, [S, ...], its picks, and the rotary tables that it
    was given, two of [S, d]. tokens: [1, S]."""
    seen = {}
    with ExitStack() as stack, torch.no_grad():
        for layer, indexer in indexers(model).items():
            for name in ("wq_b", "k_norm", "weights_proj"):
                hook = getattr(indexer, name).register_forward_hook(
                    lambda _, __, out, key=(layer, name): seen.update({key: out[0]})
                )
                stack.callback(hook.remove)
            hook = indexer.register_forward_hook(lambda _, __, out, key=(layer, "picks"): seen.update({key: out[0]}))
            stack.callback(hook.remove)

            def given(indexer, args, kwargs, key=(layer, "tables")):
                tables = inspect.signature(indexer.forward).bind(*args, **kwargs).arguments["position_embeddings"]
                seen[key] = [table[0] for table in tables]

            stack.callback(indexer.register_forward_pre_hook(given, with_kwargs=True).remove)
        model(tokens, use_cache=False)
    return seen


def stock_scores(model, parts, layer, row):
    """What a layer's indexer gives tokens 0 .. row for the token at `row`: [row + 1]."""
    config, length = model.config.get_text_config(decoder=True), len(parts[layer, "k_norm"])
    halves, family = config.qk_rope_head_dim // 2, config.model_type
    c, s = (table[:, None, :halves] for table in parts[layer, "tables"])

    def turn(states):  # [S, H, d]; whatever their new order, it is that of queries and keys alike
        moving, still = states[..., : 2 * halves], states[..., 2 * halves :]
        if family in LAST:
            still, moving = states[..., : -2 * halves], states[..., -2 * halves :]
        if family in HALVES:
            first, second = moving[..., :halves], moving[..., halves:]
        else:
            first, second = moving[..., ::2], moving[..., 1::2]
        return torch.cat([first * c - second * s, second * c + first * s, still], dim=-1)

    query = turn(parts[layer, "wq_b"].view(length, config.index_n_heads, -1))[row]
    keys = turn(parts[layer, "k_norm"][:, None])[: row + 1, 0]
    weights = parts[layer, "weights_proj"][row] * (config.index_n_heads * config.index_head_dim) ** -0.5
    return (torch.relu(query @ keys.T) * weights[:, None]).sum(0)
