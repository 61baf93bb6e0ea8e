"""A tiny random model of any causal language model class that transformers has, from its config class alone.

Sizes are looked up by the names of a config's fields; what a family needs beside them stands in SPECIAL.
"""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data_gen.backbones.layers import FULL

LAYERS = 4
LARGEST = 5_000_000
"""Parameters of what is still tiny."""
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "n_embd": 32, "d_model": 32, "n_embed": 32, "dim": 32, "model_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "d_ff": 48, "dim_ff": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "shared_intermediate_size": 48, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_dim": 16,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2,
    "multi_query_group_num": 2, "head_dim": 16, "kv_channels": 16, "attention_head_dim": 16, "v_head_dim": 12,
    "max_position_embeddings": 512, "n_positions": 512, "seq_length": 512, "max_seq_len": 512, "n_ctx": 512,
    "initializer_range": 0.3, "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "index_n_heads": 16, "index_head_dim": 16, "index_topk": 12,
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
"""Values by name of a field; those that a config has not are left out."""
WINDOWS = {"sliding_window": 24, "attention_chunk_size": 32}
"""Of families that say which layers have a window: others keep their default, which is longer than the context."""

HALF_LINEAR = ["linear_attention", "full_attention"] * 2
PER_LAYER_INPUT = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
SHARED_KEYS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
ASSISTANT = {"num_hidden_layers": LAYERS, "num_kv_shared_layers": LAYERS, "vocab_size_per_layer_input": 0,
             "hidden_size_per_layer_input": 0}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN4 = {"hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
         "indexer_budget": 16, "indexer_compress_ratio": 4}  # fmt: skip
DOTS3 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
         "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12,
         "moe_shared_expert_intermediate_size": 16}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "minimax": {"sliding_window": None},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2, "index_block_size": 8,
        "index_topk_blocks": 2, "rotary_dim": 16,
    },
    "mistral4": {"head_dim": 16},
    "csm_depth_decoder_model": {"backbone_hidden_size": 32, "num_codebooks": 128},
    "kimi_linear": {"layer_types": HALF_LINEAR},
    "bailing_hybrid": {"layer_types": HALF_LINEAR},
    "helium": {"head_dim": 8},
    "gemma4": {"text_config": PER_LAYER_INPUT},
    "gemma4_text": PER_LAYER_INPUT,
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma3n_text": PER_LAYER_INPUT | SHARED_KEYS,
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * LAYERS, "router_hidden_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "n_mamba_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28},
        "audio_config": {"nemo_conv_channels": 32, "num_blocks": 2, "ext_pw_out_channel": 32,
                         "depthwise_separable_out_channel": 32},
    },
    "roc_bert": {"pronunciation_vocab_size": 128, "shape_vocab_size": 128, "pronunciation_embed_dim": 8,
                 "shape_embed_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
}  # fmt: skip
"""What single families need beside SIZES, that of their parts by the part's name."""


@cache
def classes() -> dict[str, str]:
    """`model_type` -> name of the causal LM class: all that AutoModelForCausalLM knows, and those that transformers
    exports under such a name beside them."""
    known = {family: str(name) for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    named = {name for name in dir(transformers) if name.endswith("ForCausalLM") and not name.startswith("Auto")}
    return known | {getattr(transformers, name).config_class.model_type: name for name in named - set(known.values())}


def families() -> Iterator[str]:
    """`model_type` of every architecture with a causal LM class but DeepSeek-V4, whose own tests have a tiny one."""
    return iter(sorted(set(classes()) - {"deepseek_v4"}))


def class_of(family: str) -> Any:
    """The causal LM class of a family."""
    return getattr(transformers, classes()[family])


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model whose every part does something: what is zero or one at first is made random too."""
    made = class_of(family)
    config = _config(made.config_class, SPECIAL.get(family, {}))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in made(config).parameters())
    if count > LARGEST:
        raise ValueError(f"its config class does not take the sizes: {count:,} parameters")
    torch.manual_seed(seed)
    model = made(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _config(kind: Any, special: dict[str, Any]) -> Any:
    """A small config of a class; where its layers would all be of other kinds, the last one sees all of the history."""
    fields, mapped = {field.name for field in dataclasses.fields(kind)}, getattr(kind, "attribute_map", {})
    names = fields | set(mapped)
    settings = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # MLA: every head has keys of its own, and RoPE goes by the part that turns
        settings |= {"num_key_value_heads": 4, "head_dim": 8}
    if "layer_types" in names:
        settings |= {name: value for name, value in WINDOWS.items() if name in names}
    if parts := set(getattr(kind, "sub_configs", {})) & names:
        own = {name: value for name, value in special.items() if name in parts}
        special = {name: value for name, value in special.items() if name not in parts}
        for name in parts:
            part = type(getattr(kind(**own), name))  # of its default, where only `AutoConfig` is said
            if dataclasses.is_dataclass(part):
                settings[name] = _config(part, own.get(name, {})).to_dict()
    config = kind(**settings | special)
    kinds = list(getattr(config, "layer_types", None) or [])
    if mapped.get("layer_types", "layer_types") in fields and kinds and not set(kinds) & set(FULL):
        config = kind(**settings | {"layer_types": [*kinds[:-1], "full_attention"]} | special)
    return config
