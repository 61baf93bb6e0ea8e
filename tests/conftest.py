"""Shared settings and models of the suite."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch
from hypothesis import settings
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def tiny_model(family: str):
    """A random model of a family, fp32, the same on every call."""
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=3)).eval()
    if family == "yarn":
        rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128}
        return LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=3, rope_parameters=rope)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**TINY, num_hidden_layers=3)).eval()
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**TINY, num_hidden_layers=4, layer_types=kinds, sliding_window=24)
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "yarn", "qwen3", "gemma3"])
def model(request):
    """One tiny random model of every family."""
    return tiny_model(request.param)
