"""Multi-head latent attention (MLA), plain or with a lightning indexer over tokens (DSA), laid out like DeepSeek-V3.

Counted as serving engines run it: the maps from the latent to a head's key and value are applied to the query and to
the output, so that a step reads latents and never expands them. A latent is cached in the model's own dtype; under DSA
it is fp8 with a scale for every 128 numbers beside the part that turns, which stays bf16 (656 bytes at DeepSeek-V3.2's
widths), and an index key is fp8 with one scale (132 bytes).
"""

from typing import Any

from data_gen.core.chunks import Chunking
from data_gen.core.entry_bytes import FP32, index_key_bytes, latent_bytes
from data_gen.core.errors import InputError
from eval.plan.shapes import (
    KEY_BYTES,
    Cache,
    Model,
    Weight,
    check_sizes,
    count_module,
    dtype_bytes,
    formats,
    matrix,
    plain,
)

PAGE_TOKENS = 64
"""Tokens of a chunk under DSA: the page that serving engines prefetch."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings")  # fmt: skip
EXPERT_SIZES = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk", "q_lora_rank")


def latent_model(name: str, config: Any, chunk_tokens: int | None) -> Model:
    """The planner's model of a configuration with `kv_lora_rank`.

    Raises InputError when a size is missing, and when transformers' own module has other weights than DeepSeek-V3's
    layout gives.
    """
    sparse = getattr(config, "index_topk", None) is not None
    check_sizes(name, config, SIZES + (INDEX_SIZES if sparse else ()))
    layers, width = config.num_hidden_layers, config.index_head_dim if sparse else config.kv_lora_rank
    return Model(
        name=name,
        hidden=config.hidden_size,
        positions=config.max_position_embeddings,
        chunk_tokens=chunk_tokens or (PAGE_TOKENS if sparse else Chunking().tokens),
        key_width=width,
        key_bytes=KEY_BYTES * width,
        caches=_caches(name, config, layers, sparse),
        weights=_weights(name, config, sparse),
        state_bytes=0,
        extra_flops={},
        dtype_named=config.dtype is not None,
    )


def _caches(name: str, config: Any, layers: int, sparse: bool) -> tuple[Cache, ...]:
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    attend = config.num_attention_heads * 2 * (latent + rope + latent)  # a product with all of it, one with the latent
    if not sparse:
        entry = dtype_bytes(name, config) * (latent + rope)
        return (Cache("latents", "latent attention", layers, 1, entry, attend, paged=True),)
    entry, index_key = latent_bytes(latent, rope), index_key_bytes(config.index_head_dim)
    score = config.index_n_heads * (2 * config.index_head_dim + 2)  # a product per head, then their weighted sum
    return (
        Cache("index keys", "token scoring", _indexers(config), 1, index_key, score, paged=True),
        Cache("latents", "latent attention", layers, 1, entry, attend, top=config.index_topk, paged=True),
    )


def _indexers(config: Any) -> int:
    """Layers with an indexer of their own; others take the picks of the one before."""
    kinds = getattr(config, "indexer_types", None)
    return config.num_hidden_layers if kinds is None else list(kinds).count("full")


def _weights(name: str, config: Any, sparse: bool) -> tuple[Weight, ...]:
    hidden, layers, heads, latent = (
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.kv_lora_rank
    )  # fmt: skip
    usual, linear, expert = formats(name, config)
    key, rank = config.qk_nope_head_dim + config.qk_rope_head_dim, config.q_lora_rank or 0
    query = [matrix("attention projections", linear, heads * key, rank or hidden, layers)]
    if rank:
        query.append(matrix("attention projections", linear, rank, hidden, layers))
    products = [
        *query,
        matrix("attention projections", linear, latent + config.qk_rope_head_dim, hidden, layers),
        matrix("attention projections", linear, heads * (config.qk_nope_head_dim + config.v_head_dim), latent, layers),
        matrix("attention projections", linear, hidden, heads * config.v_head_dim, layers),
    ]
    if sparse:
        index, indexers = config.index_n_heads * config.index_head_dim, _indexers(config)
        products += [
            matrix("indexer projections", linear, index, rank, indexers),
            matrix("indexer projections", linear, config.index_head_dim, hidden, indexers),
            matrix("indexer projections", usual, config.index_n_heads, hidden, indexers),
        ]
    mixed = _expert_layers(config)
    products.append(matrix("feed-forward", linear, config.intermediate_size, hidden, 3 * (layers - mixed)))
    routed: list[Weight] = []
    if mixed:
        check_sizes(name, config, EXPERT_SIZES)
        inner, experts, chosen = config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok
        products.append(matrix("shared experts", linear, inner * config.n_shared_experts, hidden, 3 * mixed))
        routed = [
            matrix("router", usual, experts, hidden, mixed),
            matrix("routed experts", expert, inner, hidden, 3 * mixed * experts, used=3 * mixed * chosen),
        ]
    head = matrix("output head", usual, config.vocab_size, hidden)
    products.append(Weight("output head", 0, head.used, 0) if config.tie_word_embeddings else head)
    embedding = matrix("embedding", usual, config.vocab_size, hidden, used=0)
    found, multiplied = count_module(name, config)
    counted = sum(weight.values for weight in (*products, *routed, embedding))
    norms = found - counted
    used = sum(weight.used for weight in products)
    if multiplied != used or not 0 < norms < counted // 100:
        raise InputError(
            f"{name}: model type {config.model_type} is not laid out like DeepSeek-V3 (its module multiplies with "
            f"{multiplied:,} weights and has {found:,}, not {used:,} and {counted:,} beside norms)"
        )
    return (*products, *routed, embedding, matrix("norms and biases", plain(FP32), 1, norms, used=0))


def _expert_layers(config: Any) -> int:
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return list(kinds).count("sparse")
    if getattr(config, "n_routed_experts", None) is None:
        return 0
    return config.num_hidden_layers - min(config.first_k_dense_replace, config.num_hidden_layers)
