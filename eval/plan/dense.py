"""Dense decoders laid out like Llama: grouped-query attention, full or sliding, and a gated feed-forward block."""

from typing import Any

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.plan.shapes import KEY_BYTES, Cache, Model, Weight, check_sizes, count_module, dtype_bytes, matrix, plain

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
          "max_position_embeddings")  # fmt: skip


def dense_model(name: str, config: Any, chunk_tokens: int | None) -> Model:
    """The planner's model of a dense text configuration.

    Raises InputError when a size is missing, on layers other than full and sliding attention, when no layer sees the
    whole context, and when transformers' own module has other matrices than a gated Llama-like decoder.
    """
    if getattr(config, "is_heterogeneous", False):
        raise InputError(f"{name}: model type {config.model_type}: its layers differ in more than their attention")
    check_sizes(name, config, SIZES)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    number = dtype_bytes(name, config)
    kinds = _layer_kinds(name, config)
    attend, entry = 4 * heads * width, 2 * kv_heads * width * number
    caches = [Cache("full-attention KV", "full attention", kinds.count(FULL), 1, entry, attend, paged=True)]
    if sliding := kinds.count(SLIDING):
        caches.append(Cache("window", "window attention", sliding, 1, entry, attend, window=config.sliding_window))
    return Model(
        name=name,
        hidden=config.hidden_size,
        positions=config.max_position_embeddings,
        chunk_tokens=chunk_tokens or Chunking().tokens,
        key_width=kv_heads * width,
        key_bytes=KEY_BYTES * kv_heads * width,
        caches=tuple(caches),
        weights=_weights(name, config, heads * width, kv_heads * width, number),
        state_bytes=0,
        extra_flops={},
        dtype_named=config.dtype is not None,
    )


def _layer_kinds(name: str, config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # older families: all layers alike
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        kinds = [SLIDING if slides else FULL] * config.num_hidden_layers
    if unknown := set(kinds) - {FULL, SLIDING}:
        raise InputError(f"{name}: layers of kind {', '.join(sorted(unknown))}; known are {FULL} and {SLIDING}")
    if FULL not in kinds:
        raise InputError(f"{name}: no layer sees the whole context, so there is nothing to keep or drop")
    return list(kinds)


def _weights(name: str, config: Any, query_width: int, kv_width: int, number: int) -> tuple[Weight, ...]:
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    layers, usual, tied = config.num_hidden_layers, plain(number), getattr(config, "tie_word_embeddings", False)
    head = matrix("output head", usual, vocabulary, hidden)
    matrices = [
        matrix("attention projections", usual, query_width, hidden, layers),
        matrix("attention projections", usual, kv_width, hidden, 2 * layers),
        matrix("attention projections", usual, hidden, query_width, layers),
        matrix("feed-forward", usual, inner, hidden, 3 * layers),
        Weight("output head", 0, head.used, 0) if tied else head,
    ]
    embedding = matrix("embedding", usual, vocabulary, hidden, used=0)
    found, linear = count_module(name, config)
    if linear != sum(weight.used for weight in matrices):
        raise InputError(
            f"{name}: model type {config.model_type} is not laid out like Llama (its module multiplies with {linear:,} "
            f"weights, not {sum(weight.used for weight in matrices):,}); known are deepseek_v4, latent attention as in "
            "DeepSeek-V3, and dense gated decoders"
        )
    rest = found - sum(weight.values for weight in [*matrices, embedding])
    return (*matrices, embedding, matrix("norms and biases", usual, 1, rest, used=0))
