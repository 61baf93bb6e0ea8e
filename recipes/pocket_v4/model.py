"""The pocket DeepSeek-V4: the stock class with banded attention, and what its card says of it."""

from typing import Any

from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from recipes.pocket.family import PocketFamily
from recipes.pocket_v4 import attention
from recipes.pocket_v4.indexer import IndexerProbe


def _shape(config: dict[str, Any]) -> str:
    kinds = {kind: config["layer_types"].count(kind) for kind in dict.fromkeys(config["layer_types"])}
    layers = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in kinds.items())
    rates = config["compress_rates"]
    return f"""{config["num_hidden_layers"]} layers ({layers}) of width {config["hidden_size"]};
    {config["num_attention_heads"]} heads of width {config["head_dim"]}; sliding window {config["sliding_window"]}; an
    entry every {rates["compressed_sparse_attention"]} tokens in sparse and every
    {rates["heavily_compressed_attention"]} in heavily compressed layers; lightning indexers with
    {config["index_n_heads"]} heads of width {config["index_head_dim"]} that pick {config["index_topk"]} entries;
    {config["n_routed_experts"]} experts, {config["num_experts_per_tok"]} a token."""


FAMILY = PocketFamily(
    name="pocket_v4",
    title="Pocket DeepSeek-V4",
    causal_lm=DeepseekV4ForCausalLM,
    indexer=DeepseekV4Indexer,
    implementations={"attn_implementation": attention.NAME, "experts_implementation": attention.NAME},
    mask=attention.no_mask,
    probe=IndexerProbe,
    entry_tokens=lambda config: config.compress_rates["compressed_sparse_attention"],
    shape=_shape,
    target="from the joint softmax with window and sink",
    closed="sliding window and heavily compressed attention",
)
