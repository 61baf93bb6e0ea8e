"""MLA and DSA by hand at the shapes of DeepSeek-V3.2 and GLM-5; weights and caches against transformers' modules."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV32Config, GlmMoeDsaConfig

from benchmarks.tiny_models import tiny
from data_gen.core.errors import InputError
from eval.plan import PlanSettings, make_plan
from eval.plan.load import SHIPPED, load_model

GIB, MIB = 2**30, 2**20


def weight_sum(model, field):
    return sum(getattr(weight, field) for weight in model.weights)


@pytest.mark.parametrize(("name", "total", "active"), [("deepseek-v3.2", 671e9, 37e9), ("glm-5", 744e9, 40e9)])
def test_they_are_as_large_as_their_makers_say(name, total, active):
    model = load_model(name, None)
    assert weight_sum(model, "values") == pytest.approx(total, rel=0.01)
    assert weight_sum(model, "used") == pytest.approx(active, rel=0.04)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
def test_they_have_as_many_weights_as_the_module(name):
    config = AutoConfig.from_pretrained(str(SHIPPED / f"{name}.json"))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert weight_sum(load_model(name, None), "values") == sum(part.numel() for part in module.parameters())


@pytest.mark.parametrize(("name", "kind"), [("deepseek-v3.2", DeepseekV32Config), ("glm-5", GlmMoeDsaConfig)])
def test_their_sizes_are_the_defaults_of_the_config_class(name, kind):
    """transformers documents these classes as the published checkpoints."""
    shipped, defaults = json.loads((SHIPPED / f"{name}.json").read_text()), kind()
    sizes = {field: value for field, value in shipped.items() if isinstance(value, int) and not isinstance(value, bool)}
    sizes.pop("rope_theta", None)
    assert len(sizes) > 20 and sizes == {field: getattr(defaults, field) for field in sizes}


def test_v32_at_128k_by_hand():
    row = make_plan("deepseek-v3.2", [2**17], PlanSettings(kept=1 / 8, indexer_layers=3, heads=64, rank=1024)).rows[0]
    token = 61 * (512 + 4 * 4 + 2 * 64 + 132)  # fp8 latent, four scales, bf16 rope; index key and its scale
    assert token == 61 * (656 + 132)
    keys = 3 * 2**11 * 2 * 128  # 2,048 pages of 64 tokens, fp16
    assert row["chunks"] == 2**11 and row["resident_chunks"] == 2**8
    assert row["kv_gb_full"] * GIB == 2**17 * token
    assert row["kv_gb_lsa"] * GIB == pytest.approx(2**14 * token + keys)
    assert row["host_gb"] * GIB == 2**17 * token
    assert row["fetch_mb_per_refresh"] * MIB == pytest.approx(0.3 * 2**8 * 64 * token)
    score, attend = 64 * (2 * 128 + 2), 128 * 2 * (512 + 64 + 512)
    terms = row["gflop_terms"]
    assert terms["token scoring"]["full"] * 1e9 == pytest.approx(61 * 2**17 * score)
    assert terms["token scoring"]["lsa"] * 1e9 == pytest.approx(61 * 2**14 * score)
    assert terms["latent attention"]["full"] * 1e9 == pytest.approx(61 * 2048 * attend)
    assert terms["latent attention"]["lsa"] == terms["latent attention"]["full"]
    assert terms["memory indexer scoring"]["lsa"] * 1e9 == pytest.approx(3 / 64 * 2**11 * 64 * 258)


def test_glm_5_at_64k_by_hand():
    row = make_plan("glm-5", [2**16], PlanSettings(kept=1 / 8, indexer_layers=3, heads=32, rank=1024)).rows[0]
    token = 78 * (656 + 132)
    assert row["kv_gb_full"] * GIB == 2**16 * token
    assert row["kv_gb_lsa"] * GIB == pytest.approx(2**13 * token + 3 * 2**10 * 2 * 128)
    terms = {name: term["full"] * 1e9 for name, term in row["gflop_terms"].items() if not name.startswith("memory")}
    query, latent = 6144 * 2048 + 2048 * 64 * (192 + 64), 6144 * (512 + 64) + 512 * 64 * (192 + 256)
    assert terms == pytest.approx(
        {
            "token scoring": 78 * 2**16 * 32 * (2 * 128 + 2),
            "latent attention": 78 * 2048 * 64 * 2 * (512 + 64 + 512),
            "attention projections": 2 * 78 * (query + latent + 64 * 256 * 6144),
            "indexer projections": 2 * 78 * (2048 * 32 * 128 + 6144 * 128 + 6144 * 32),
            "feed-forward": 2 * 3 * 3 * 6144 * 12288,  # the first three layers
            "router": 2 * 75 * 256 * 6144,
            "shared experts": 2 * 75 * 3 * 6144 * 2048,
            "routed experts": 2 * 75 * 8 * 3 * 6144 * 2048,
            "output head": 2 * 154880 * 6144,
        }
    )
    assert row["gflop_terms"]["token scoring"]["lsa"] * 1e9 == pytest.approx(78 * 2**13 * 32 * (2 * 128 + 2))
    assert row["gflop_terms"]["latent attention"]["lsa"] * 1e9 == pytest.approx(terms["latent attention"])


def test_plain_mla_by_hand(tmp_path):
    """DeepSeek-V3's shape: no indexer, latents in bf16."""
    settings = json.loads((SHIPPED / "deepseek-v3.2.json").read_text())
    settings = {name: value for name, value in settings.items() if not name.startswith("index_")}
    settings |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    row = make_plan(str(tmp_path), [2**15], PlanSettings(kept=1 / 4)).rows[0]
    assert row["kv_gb_full"] * GIB == 2**15 * 61 * 2 * (512 + 64) and row["chunks"] == 2**11
    assert row["kv_gb_lsa"] * GIB == pytest.approx(2**13 * 61 * 2 * 576 + 3 * 2**11 * 2 * 512)
    assert row["gflop_terms"]["latent attention"]["full"] * 1e9 == pytest.approx(
        61 * 2**15 * 128 * 2 * (512 + 64 + 512)
    )
    # 671 B parameters beside the layer that predicts a second token, of which 37 B are used
    assert weight_sum(load_model(str(tmp_path), None), "values") == pytest.approx(671e9, rel=0.005)


def test_layers_that_share_picks_keep_no_index_keys(tmp_path):
    settings = json.loads((SHIPPED / "glm-5.json").read_text()) | {"index_topk_freq": 4, "index_skip_topk_offset": 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    caches = {cache.name: cache.layers for cache in load_model(str(tmp_path), None).caches}
    assert caches == {"index keys": 21, "latents": 78}  # 0, 1, then every fourth up to 77


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3"])
def test_a_tiny_module_caches_and_holds_as_much(family, tmp_path):
    module = tiny(family)
    module.config.dtype = torch.float32
    module.config.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), None)
    assert weight_sum(model, "values") == sum(part.numel() for part in module.parameters())
    with torch.no_grad():
        past = module(torch.arange(50)[None], use_cache=True).past_key_values
    for cache in model.caches:
        assert cache.entries(50) == past.layers[0].keys.shape[2] == 50
    latents = next(cache for cache in model.caches if cache.name == "latents")
    assert latents.layers == len(past.layers)
    if family in ("deepseek_v3", "minicpm3"):
        held = past.layers[0]
        assert 50 * latents.entry_bytes == held.keys.nbytes + held.values.nbytes


def test_another_layout_is_refused(tmp_path):
    tiny("kimi_linear").config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="n_routed_experts is None, not one positive number"):
        load_model(str(tmp_path), None)
