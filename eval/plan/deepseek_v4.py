"""DeepSeek-V4: sliding windows, compressed sparse attention (CSA), heavily compressed attention (HCA), experts.

Names of fields and modules: transformers' `deepseek_v4`. Storage: the published checkpoints for weights, what serving
engines keep for caches.
"""

from typing import Any

from data_gen.core.entry_bytes import FP32, compressed_bytes, index_key_bytes
from data_gen.core.errors import InputError
from eval.plan.shapes import Cache, Model, StoredBytes, Weight, check_sizes, formats, matrix, plain

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "num_attention_heads", "head_dim",
         "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
         "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "hc_mult")  # fmt: skip
OVERLAP = 2
"""A CSA entry is pooled from two neighbouring chunks: twice the width to project, twice the tokens to hold."""
INT64 = 8


def deepseek_v4_model(name: str, config: Any, chunk_tokens: int | None) -> Model:
    """The planner's model of a `DeepseekV4Config`. Raises InputError on a missing size, no CSA layer,
    chunks of another length, and weights of a format that is not known.
    """
    check_sizes(name, config, SIZES)
    rate = config.compress_rates[CSA]
    if not config.layer_types.count(CSA):
        raise InputError(f"{name}: no compressed sparse attention layer, so there is nothing to keep or drop")
    if chunk_tokens not in (None, rate):
        raise InputError(f"{name}: a chunk is one compressed entry of {rate} tokens, not {chunk_tokens}")
    index_key = index_key_bytes(config.index_head_dim)
    return Model(
        name=name,
        hidden=config.hidden_size,
        positions=config.max_position_embeddings,
        chunk_tokens=rate,
        key_width=config.index_head_dim,
        key_bytes=index_key,
        caches=_caches(config, index_key),
        weights=tuple(_weights(name, config)),
        state_bytes=_state_bytes(config),
        extra_flops={"hyper-connections": 2 * len(config.layer_types) * 2 * config.hc_mult**2 * config.hidden_size},
        dtype_named=config.dtype is not None,
    )


def _caches(config: Any, index_key: int) -> tuple[Cache, ...]:
    attend = 4 * config.num_attention_heads * config.head_dim  # a product with the entry, then one with the weights
    score = config.index_n_heads * (2 * config.index_head_dim + 2)  # a product per head, then their weighted sum
    entry = compressed_bytes(config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim)
    csa, hca = config.layer_types.count(CSA), config.layer_types.count(HCA)
    csa_rate, hca_rate = config.compress_rates[CSA], config.compress_rates[HCA]
    layers, window = len(config.layer_types), config.sliding_window
    return (
        Cache("CSA index keys", "CSA scoring", csa, csa_rate, index_key, score, paged=True),
        Cache("CSA entries", "CSA attention", csa, csa_rate, entry, attend, top=config.index_topk, paged=True),
        Cache("HCA entries", "HCA attention", hca, hca_rate, entry, attend),
        Cache("window", "window attention", layers, 1, entry, attend, window=window),
    )


def _state_bytes(config: Any) -> int:
    """fp32 values and gates of the tokens that wait in a compressor for their entry."""
    csa_values = OVERLAP * config.compress_rates[CSA] * OVERLAP * (config.head_dim + config.index_head_dim)
    hca_values = config.compress_rates[HCA] * config.head_dim
    kinds = config.layer_types
    return 2 * FP32 * (kinds.count(CSA) * csa_values + kinds.count(HCA) * hca_values)


def _weights(name: str, config: Any) -> list[Weight]:
    hidden, heads, width, rank = config.hidden_size, config.num_attention_heads, config.head_dim, config.q_lora_rank
    index_heads, index_width, vocabulary = config.index_n_heads, config.index_head_dim, config.vocab_size
    layers, csa, hca = (len(config.layer_types), config.layer_types.count(CSA), config.layer_types.count(HCA))
    experts, shared, inner = config.n_routed_experts, config.n_shared_experts, config.moe_intermediate_size
    streams, grouped = config.hc_mult, config.o_groups * config.o_lora_rank
    usual, linear, expert = formats(name, config)
    wide, chosen = plain(FP32), config.num_experts_per_tok
    heading = matrix("output head", usual, vocabulary, hidden)
    if config.tie_word_embeddings:
        heading = Weight("output head", 0, heading.used, 0)
    return [
        matrix("embedding", usual, vocabulary, hidden, used=0),
        matrix("attention projections", linear, rank, hidden, layers),
        matrix("attention projections", linear, heads * width, rank, layers),
        matrix("attention projections", linear, width, hidden, layers),
        matrix("attention projections", linear, grouped, heads * width // config.o_groups, layers),
        matrix("attention projections", linear, hidden, grouped, layers),
        matrix("compressor projections", usual, OVERLAP * width, hidden, 2 * csa),
        matrix("compressor projections", usual, OVERLAP * index_width, hidden, 2 * csa),
        matrix("compressor projections", usual, width, hidden, 2 * hca),
        matrix("indexer projections", linear, index_heads * index_width, rank, csa),
        matrix("indexer projections", usual, index_heads, hidden, csa),
        matrix("router", usual, experts, hidden, layers),
        matrix("routed experts", expert, inner, hidden, 2 * layers * experts, used=2 * layers * chosen),
        matrix("routed experts", expert, hidden, inner, layers * experts, used=layers * chosen),
        matrix("shared experts", linear, inner, hidden, 2 * layers * shared),
        matrix("shared experts", linear, hidden, inner, layers * shared),
        matrix("hyper-connections", wide, streams * (streams + 2), streams * hidden, 2 * layers),
        matrix("hyper-connections", wide, streams, streams * hidden),
        heading,
        *_small(config, layers, csa, hca, usual),
    ]


def _small(config: Any, layers: int, csa: int, hca: int, usual: StoredBytes) -> list[Weight]:
    """What no token is multiplied with as a matrix: norms, sinks, position biases, routing tables."""
    width, index_width, streams = config.head_dim, config.index_head_dim, config.hc_mult
    norms = layers * (2 * config.hidden_size + config.q_lora_rank + width) + config.hidden_size
    norms += csa * (width + index_width) + hca * width
    wide = layers * config.num_attention_heads  # attention sinks
    wide += csa * config.compress_rates[CSA] * OVERLAP * (width + index_width)
    wide += hca * config.compress_rates[HCA] * width
    wide += 2 * layers * (streams * (streams + 2) + 3) + streams + 1
    hashed = config.mlp_layer_types.count("hash_moe")
    wide += (layers - hashed) * config.n_routed_experts
    return [
        matrix("norms and tables", usual, 1, norms, used=0),
        matrix("norms and tables", plain(FP32), 1, wide, used=0),
        matrix("norms and tables", plain(INT64), config.vocab_size, config.num_experts_per_tok, hashed, used=0),
    ]
