"""The pocket DeepSeek-V3.2: the stock class with fused attention, and what its card says of it."""

from typing import Any

from transformers import DeepseekV32ForCausalLM
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from recipes.pocket.family import PocketFamily
from recipes.pocket_dsa import attention
from recipes.pocket_dsa.indexer import TokenProbe, pick_in_batches


def _shape(config: dict[str, Any]) -> str:
    return f"""{config["num_hidden_layers"]} layers of width {config["hidden_size"]}, all with multi-head latent
    attention: {config["num_attention_heads"]} heads, their keys and values made of a latent of
    {config["kv_lora_rank"]} numbers a token beside {config["qk_rope_head_dim"]} that turn with the position; lightning
    indexers with {config["index_n_heads"]} heads of width {config["index_head_dim"]} that pick {config["index_topk"]}
    tokens. No experts: every MLP is dense."""


FAMILY = PocketFamily(
    name="pocket_dsa",
    title="Pocket DeepSeek-V3.2",
    causal_lm=DeepseekV32ForCausalLM,
    indexer=DeepseekV32Indexer,
    implementations={"attn_implementation": attention.NAME},
    mask=attention.causal_mask,
    probe=TokenProbe,
    entry_tokens=lambda config: 1,
    shape=_shape,
    target="on 256 rows of each document, those of answers first",
    closed=None,
    prepare=pick_in_batches,
)
