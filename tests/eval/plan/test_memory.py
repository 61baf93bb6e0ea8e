"""Cache bytes against the caches that transformers builds; pool, traffic and requests against brute force."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from benchmarks import tiny_models
from data_gen.backbones.load import adapter
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.types import Manifest
from eval.offline import refresh as lookahead
from eval.plan import PlanSettings, make_plan
from eval.plan.load import FAMILIES, load_model
from eval.plan.plan import HistoryShare, chunk_bytes, requests_that_fit, weight_bytes
from tests.conftest import tiny_model

GIB, MIB = 2**30, 2**20
FLASH = load_model("deepseek-v4-flash", None)


@pytest.mark.parametrize("context", [5, 31, 100])
def test_entries_are_those_of_the_module_s_cache(tiny, context):
    module, folder = tiny
    with torch.no_grad():
        past = module(torch.arange(context)[None] % 90, use_cache=True).past_key_values
    caches = {cache.name: cache for cache in load_model(folder, None).caches}
    for layer, kind in enumerate(getattr(module.config, "layer_types", ["full_attention"] * 3)):
        held = past.layers[layer]
        if kind == "full_attention":
            cache = caches["full-attention KV"]
            stored = sum(tensor.numel() * tensor.element_size() for tensor in (held.keys, held.values))
            assert stored == cache.entries(context) * cache.entry_bytes
        elif kind.startswith(("compressed", "heavily")):
            names = ("CSA entries", "CSA index keys") if kind.startswith("compressed") else ("HCA entries",)
            for name, held_as in zip(names, ("compressor", "indexer"), strict=False):
                assert held.compressed_kv[held_as].shape[1] == caches[name].entries(context)
        if "window" in caches and kind != "full_attention":  # transformers keeps one token less than it reads
            assert held.keys.shape[-2] == min(context, caches["window"].window - 1)


def test_the_text_part_of_a_multimodal_file_is_planned(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    whole = {"model_type": "gemma3", "dtype": "bfloat16", "text_config": text | {"sliding_window": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    model = load_model(str(tmp_path), None)  # as Gemma-3-4B: 8 query and 4 key heads of 256, every sixth layer is full
    assert [(cache.layers, cache.window, cache.entry_bytes) for cache in model.caches] == [
        (5, None, 2 * 4 * 256 * 2),
        (29, 1024, 2 * 4 * 256 * 2),
    ]
    assert model.dtype_named and sum(weight.values for weight in model.weights) == 3_880_263_168


def test_v4_entries_take_the_bytes_that_serving_engines_store():
    found = {cache.name: cache.entry_bytes for cache in FLASH.caches}
    assert found == {"CSA index keys": 132, "CSA entries": 584, "HCA entries": 584, "window": 584}


def test_v4_flash_at_one_million_tokens_by_hand():
    row = make_plan("deepseek-v4-flash", [2**20]).rows[0]
    entry, key = 584, 132
    full = 2**18 * 21 * (entry + key) + 2**13 * 20 * entry + 43 * 128 * entry
    lsa = 24576 * 21 * (entry + key) + 2**13 * 20 * entry + 43 * 128 * entry + 3 * 2**18 * key
    assert row["kv_gb_full"] * GIB == full
    assert row["kv_gb_lsa"] * GIB == pytest.approx(lsa)
    assert row["host_gb"] * GIB == 2**18 * 21 * (entry + key)
    assert row["fetch_mb_per_refresh"] * MIB == pytest.approx(0.3 * 24576 * 21 * (entry + key))
    assert row["fetch_mb_per_token"] == row["fetch_mb_per_refresh"] / 64
    overlapped = 8 * 2 * (512 + 128)  # tokens held by a CSA compressor and its indexer's, twice the width each
    assert row["state_gb"] * GIB == 2 * 4 * (21 * overlapped + 20 * 128 * 512)


@given(context=st.integers(1, 5000), kept=st.floats(0, 1), tokens=st.sampled_from([4, 16]))
def test_resident_entries_are_those_of_the_kept_chunks(models, context, kept, tokens):
    model = models[tokens]
    residency = HistoryShare.at(model, PlanSettings(kept=kept), context)
    chunk_of = [token // tokens for token in range(context)]
    whole = sum(chunk_of.count(chunk) == tokens for chunk in set(chunk_of))
    assert residency.chunks == whole
    assert residency.resident == min(whole, max(1, int(kept * whole)))
    tail = context - whole * tokens
    for cache in model.caches:
        if cache.paged:
            tokens_held = residency.resident * tokens + tail
            assert residency.entries(cache) == tokens_held // cache.tokens
        else:
            assert residency.entries(cache) == cache.entries(context)


@settings(max_examples=50)
@given(memory=st.integers(0, 400), gpus=st.integers(1, 8), request=st.integers(1, 50))
def test_requests_fill_each_gpu_and_not_more(memory, gpus, request):
    asked = PlanSettings(gpu_memory=memory, gpus=gpus)
    fitted = requests_that_fit(FLASH, asked, request * GIB, replicated=GIB)
    on_one, rest = divmod(fitted, gpus)
    assert rest == 0
    taken = weight_bytes(FLASH) / gpus + GIB
    assert on_one == 0 or taken + on_one * request * GIB <= memory * GIB
    assert taken + (on_one + 1) * request * GIB > memory * GIB


def test_no_gpu_memory_no_requests():
    row = make_plan("deepseek-v4-flash", [2**18]).rows[0]
    assert row["requests_full"] is None and row["requests_lsa"] is None
    row = make_plan("deepseek-v4-flash", [2**18], PlanSettings(gpu_memory=141, gpus=2)).rows[0]
    assert 0 < row["requests_full"] < row["requests_lsa"]


@pytest.mark.parametrize("memory", [float("inf"), float("nan")])
def test_memory_that_is_no_number_is_refused(memory):
    with pytest.raises(InputError, match=r"GPU memory of (inf|nan) GiB"):
        make_plan("deepseek-v4-flash", [2**18], PlanSettings(gpu_memory=None).model_copy(update={"gpu_memory": memory}))


def bytes_traced(info, chunk_tokens):
    trace = TraceConfig(chunking=Chunking(tokens=chunk_tokens), layers=info.full_layers[:1])
    return lookahead.chunk_bytes(Manifest(backbone=info, trace=trace, documents={}, plan={}, versions={}))


def test_bytes_of_a_chunk_in_dumps_are_the_planner_s():
    """584 bytes of an entry and 132 of its index key, in 21 layers."""
    assert bytes_traced(V4_FLASH, FLASH.chunk_tokens) == chunk_bytes(FLASH) == 716 * 21
    assert bytes_traced(replace(V4_FLASH, entry_bytes=None), 4) is None


@pytest.mark.parametrize(
    "family", [*FAMILIES, "llama", "qwen3", "gemma3_text", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"]
)
def test_bytes_of_a_chunk_in_traces_are_the_planner_s(family, tmp_path):
    """Every family that is both traced and planned."""
    module = tiny_model(family) if family in FAMILIES else tiny_models.tiny(family)
    same_bytes(module, tmp_path)


def test_layers_that_take_another_s_picks_store_latents_alone(tmp_path):
    settings = tiny_models.tiny("glm_moe_dsa").config.to_dict() | {"indexer_types": ["full", "shared", "full", "full"]}
    same_bytes(GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**settings)).eval(), tmp_path)


def same_bytes(module, tmp_path):
    info = adapter(module).info
    module.config.dtype = torch.bfloat16
    module.config.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), None)
    assert bytes_traced(info, model.chunk_tokens) == chunk_bytes(model) > 0


def test_traffic_grows_with_churn_and_the_resident_set():
    half = make_plan("deepseek-v4-flash", [2**18], PlanSettings(kept=0.5, churn=0.5)).rows[0]
    assert half["fetch_mb_per_refresh"] * MIB == 0.5 * 2**15 * chunk_bytes(FLASH)
    assert make_plan("deepseek-v4-flash", [2**18], PlanSettings(churn=0)).rows[0]["fetch_mb_per_refresh"] == 0
