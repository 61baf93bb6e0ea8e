"""Tiny models whose modules and caches the planner's figures are held against."""

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from eval.plan.load import FAMILIES, load_model
from tests.conftest import tiny_model


def tiny_v4():
    """All three kinds of layer, every width different from every other, all compressed entries selected."""
    torch.manual_seed(0)
    config = DeepseekV4Config(
        vocab_size=96,
        hidden_size=40,
        moe_intermediate_size=24,
        num_hidden_layers=6,
        compress_ratios=[0, 4, 8, 4, 8, 4, 0],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        num_attention_heads=6,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=20,
        o_groups=3,
        o_lora_rank=12,
        sliding_window=10,
        index_n_heads=5,
        index_head_dim=16,
        index_topk=512,
        n_routed_experts=7,
        num_experts_per_tok=3,
        num_hash_layers=2,
        hc_mult=3,
        max_position_embeddings=512,
        dtype="float32",
    )
    config._experts_implementation = "eager"
    return DeepseekV4ForCausalLM(config).eval()


@pytest.fixture(params=[*FAMILIES, "llama", "qwen3", "gemma3"])
def tiny(request, tmp_path):
    """(module, folder with its config.json)."""
    module = tiny_v4() if request.param == "deepseek_v4" else tiny_model(request.param)
    module.set_attn_implementation("eager")
    module.config.dtype = torch.float32
    module.config.save_pretrained(tmp_path)
    return module, str(tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Chunk tokens -> the planner's model: V4-Flash, and a tiny Gemma-3 with sliding layers."""
    folder = tmp_path_factory.mktemp("gemma3")
    tiny_model("gemma3").config.save_pretrained(folder)
    return {4: load_model("deepseek-v4-flash", None), 16: load_model(str(folder), None)}
