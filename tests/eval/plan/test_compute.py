"""Operations per decoded token, against what torch counts while transformers decodes one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.plan import PlanSettings, make_plan
from eval.plan.load import load_model

PROMPT = 100


def counted_flops(module, prompt):
    """Matrix products that torch sees in decoding one token behind `prompt` tokens."""
    ids = torch.randint(0, 90, (1, prompt + 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        past = module(ids[:, :prompt], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            module(ids[:, prompt:], past_key_values=past, use_cache=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("prompt", [7, 47, PROMPT])
def test_full_attention_costs_what_torch_counts(tiny, prompt):
    module, folder = tiny
    row = make_plan(folder, [prompt + 1]).rows[0]
    # transformers sums the indexer's heads elementwise, which torch does not count as a product
    summed = sum(
        cache.layers * cache.entries(prompt + 1) * 2 * module.config.index_n_heads
        for cache in load_model(folder, None).caches
        if cache.reader == "CSA scoring"
    )
    assert round(row["gflop_full"] * 1e9) - summed == counted_flops(module, prompt)


def test_each_term_of_v4_flash_follows_from_its_sizes():
    row = make_plan("deepseek-v4-flash", [2**20]).rows[0]
    entry, score = 4 * 64 * 512, 64 * (2 * 128 + 2)
    expected = {
        "CSA scoring": (21 * 2**18 * score, 21 * 24576 * score),
        "CSA attention": (21 * 512 * entry,) * 2,
        "HCA attention": (20 * 2**13 * entry,) * 2,
        "window attention": (43 * 128 * entry,) * 2,
        "memory indexer scoring": (0, 3 * 2**18 * 128 * 258 / 64),
        "memory indexer projections": (0, 3 * 2 * (4096 * 2048 + 2048 * 128 * 128 + 4096 * 128) / 64),
    }
    terms = row["gflop_terms"]
    for name, (full, lsa) in expected.items():
        assert (terms[name]["full"], terms[name]["lsa"]) == pytest.approx((full / 1e9, lsa / 1e9)), name
    for side in ("full", "lsa"):
        assert sum(term[side] for term in terms.values()) == pytest.approx(row[f"gflop_{side}"])
    fixed = set(terms) - set(expected)
    assert all(terms[name]["full"] == terms[name]["lsa"] > 0 for name in fixed)


def test_keeping_everything_only_adds_the_memory_indexer():
    row = make_plan("deepseek-v4-flash", [2**18], PlanSettings(kept=1)).rows[0]
    added = sum(term["lsa"] for name, term in row["gflop_terms"].items() if name.startswith("memory indexer"))
    assert row["gflop_lsa"] == pytest.approx(row["gflop_full"] + added)
    keys = row["kv_terms"]["memory indexer keys"]["lsa"]
    assert row["kv_gb_lsa"] == pytest.approx(row["kv_gb_full"] + keys)


def test_dense_models_have_no_paper_columns(tiny):
    module, folder = tiny
    row = make_plan(folder, [256]).rows[0]
    dense = module.config.model_type != "deepseek_v4"
    assert (row["gflop_full_paper"] is None) == (row["gflop_lsa_paper"] is None) == dense
