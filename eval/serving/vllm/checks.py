"""What is refused when the server starts: another model's bundle, other block sizes, options that are not supported."""

# pyright: reportMissingImports=false

import re
from pathlib import Path
from typing import Any

from data_gen.core.errors import InputError, explained
from data_gen.core.fingerprint import checkpoint_tensors, fingerprint
from eval.serving.select import Limits
from eval.serving.vllm.settings import load_settings
from indexer_train.formats.bundle import load_scorer
from indexer_train.spec import IndexerSpec

CONNECTOR = "LookaheadConnector"
PLAIN_CACHE = ("auto", "float16", "bfloat16", "float32")
FIRST, AFTER = (0, 26), (0, 31)
"""vLLM's versions: the first one that has what the plugin uses, and the one after the last that was read."""


def supported(version: str) -> bool:
    """Is this a version of vLLM whose inner parts were compared with what the plugin uses?"""
    return FIRST <= tuple(map(int, re.findall(r"\d+", version)[:2])) < AFTER


def check_version(version: str) -> None:
    """Raise InputError unless `supported`."""
    if not supported(version):
        raise InputError(f"vLLM {version}: the plugin needs one from 0.26 on and before 0.31; install vllm==0.30.0")


def check(config: Any) -> None:
    """Raise InputError, in one line, unless this server can decode with the bundle. config: vLLM's `VllmConfig`."""
    settings = load_settings(config.additional_config)
    if settings.trace is not None:
        try:
            settings.trace.open("a").close()
        except OSError as error:
            raise InputError(f"trace: {explained(error)}; name a file that can be written") from error
    spec = load_scorer(settings.bundle).spec
    if settings.cap is not None:
        Limits(cap=settings.cap).check(spec.chunking)
    if settings.fallback is not None:
        settings.fallback.check(settings.selection or spec.selection)
    check_options(config)
    if settings.host_gib is not None:
        check_memory(config)
    check_shape(spec, config)
    found = fingerprint(checkpoint_tensors(checkpoint_folder(config)))
    if found != spec.backbone:
        raise InputError(
            f"the bundle {settings.bundle} is for a model with fingerprint {spec.backbone}, "
            f"but {config.model_config.model} has {found}"
        )
    # The engine keeps compiled models from one start to the next, and what is caught in them depends on these.
    config.additional_config["lookahead_layers"] = spec.layers


def check_options(config: Any) -> None:
    """Raise InputError for options of the engine under which resident sets would be wrong or were never tested."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    transfer, attention = config.kv_transfer_config, config.attention_config
    backend = attention.backend_per_kind.get("full_attention", attention.backend)
    wrong = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "dual batch overlap": parallel.enable_dbo,
        "the second model runner (without VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        f"a KV cache in {cache.cache_dtype}": cache.cache_dtype not in PLAIN_CACHE,
        "multimodal input": model.is_multimodal_model,
        "pooling": model.runner_type != "generate",
        "a stock attention backend (without --attention-backend CUSTOM)": config.device_config.device_type != "cpu"
        and (backend is None or backend.name != "CUSTOM"),
        "KV transfer to or from other caches": transfer is not None and transfer.kv_connector != CONNECTOR,
        "sliding layers without the hybrid KV cache manager": _sliding(model.hf_text_config)
        and bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
    }  # fmt: skip
    for what, asked in wrong.items():
        if asked:
            raise InputError(f"{what}: not supported together with lookahead sparse attention; start without")
    model.disable_cascade_attn = True  # it reads a prefix common to the batch's full tables


def check_memory(config: Any) -> None:
    """Raise InputError where blocks cannot leave the engine's pool."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    if not hasattr(KVConnectorBase_V1, "bind_kv_cache_manager"):
        raise InputError("host_gib: this vLLM does not lend its block manager; install vllm==0.30.0 or leave it out")
    if _sliding(config.model_config.hf_text_config):
        raise InputError("host_gib: cold blocks of models with sliding layers stay in the pool; leave it out")


def check_shape(spec: IndexerSpec, config: Any) -> None:
    """Raise InputError for a bundle whose chunks, layers or widths are not the engine's."""
    text, tokens = config.model_config.hf_text_config, spec.chunking.tokens
    if config.cache_config.block_size != tokens:
        raise InputError(
            f"the bundle's chunks have {tokens} tokens, but the cache's blocks {config.cache_config.block_size}; "
            f"start with --block-size {tokens}"
        )
    if spec.key != "mean_pre_rope":
        raise InputError(f"the bundle's keys are of the kind {spec.key}; in vLLM only mean_pre_rope can be computed")
    kinds = layer_kinds(text)
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise InputError(f"layers of {' and '.join(other)}: not supported together with lookahead sparse attention")
    if bad := [layer for layer in spec.layers if layer >= len(kinds) or kinds[layer] != "full_attention"]:
        raise InputError(f"the indexer reads layers {bad}, which have no full attention in this model")
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)  # older ones have no groups
    width = heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    if (text.hidden_size, width) != (spec.hidden, spec.key_width):
        raise InputError(
            f"the indexer reads hidden states of {spec.hidden} and keys of {spec.key_width} values, "
            f"but the model has {text.hidden_size} and {width}"
        )


def layer_kinds(text: Any) -> list[str]:
    """Kinds of attention by layer, from a Hugging Face text configuration."""
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return list(kinds)
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * text.num_hidden_layers


def _sliding(text: Any) -> bool:
    return len(set(layer_kinds(text))) > 1


def checkpoint_folder(config: Any) -> Path:
    """Where the checkpoint's files lie: the folder named, or the hub's copy, which is fetched if need be."""
    model = config.model_config
    if Path(model.model).is_dir():
        return Path(model.model)
    from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

    return Path(
        download_weights_from_hf(model.model, config.load_config.download_dir, ["*.safetensors"], model.revision)
    )
