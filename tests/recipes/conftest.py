"""A recipe of the pocket model's shape, small enough to run in a blink."""

from pathlib import Path

import pytest

import recipes.pocket_v4
from recipes.pocket.config import PocketConfig, load_config

RECIPE = Path(recipes.pocket_v4.__file__).parent


@pytest.fixture(scope="session")
def shipped() -> PocketConfig:
    """The recipe that the committed model was trained with."""
    return load_config(RECIPE / "config.yaml")


@pytest.fixture(scope="session")
def tiny(shipped) -> PocketConfig:
    """Every kind of layer, entries of 4 and of 16 tokens, and a top-k below the number of entries."""
    settings = shipped.model_dump()
    settings["model"] |= {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["moe"] * 3,
        "num_attention_heads": 2,
        "head_dim": 64,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "index_head_dim": 32,
        "index_topk": 4,
        "initializer_range": 0.3,
    }
    settings["far"] = 16
    settings["vocabulary"] = {"keys": 8, "names": 4, "values": 10, "ordinals": 6}
    return PocketConfig.model_validate(settings)
