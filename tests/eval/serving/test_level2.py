"""Level 2 in torch equals the stock DeepSeek-V4 modules over the same quantised keys and entries."""

import copy

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import decode_keys, encode_keys, hadamard, rows_to_pages
from data_gen.core.tensors import lightning_scores
from eval.serving.entries import V4, decode_entries, encode_entries, entries_to_pages
from eval.serving.level2 import NONE, attend, score_resident, select_resident
from eval.serving.pools import HotPool
from tests.conftest import TINY_V4

SIZES = {"head_dim": V4.width, "partial_rotary_factor": V4.rope / V4.width, "index_head_dim": 128, "index_topk": 12}


class Step:
    """What one stock CSA layer computes at a decode step: inputs of scorer, indexer and eager attention."""

    def __init__(self, monkeypatch):
        torch.manual_seed(0)
        config = DeepseekV4Config(**{**copy.deepcopy(TINY_V4), **SIZES})
        model = DeepseekV4ForCausalLM(config).eval()
        attention = model.model.layers[1].self_attn
        self.scorer = attention.compressor.indexer.scorer
        eager = stock.eager_attention_forward

        def watched(module, query, key, value, mask, **kwargs):
            if module is attention:
                self.module, self.query, self.entries, self.scaling = module, query, key, kwargs["scaling"]
            return eager(module, query, key, value, mask, **kwargs)

        monkeypatch.setattr(stock, "eager_attention_forward", watched)
        self.scorer.register_forward_hook(lambda module, args, out: setattr(self, "scored", args))
        ids = torch.randint(0, 128, (2, 201), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            cache = DynamicCache(config=config)
            model(ids[:, :200], past_key_values=cache)
            model(ids[:, 200:], past_key_values=cache)
        self.eager, self.chunks = eager, 50
        self.window = self.entries.shape[2] - self.chunks


@pytest.fixture
def step(monkeypatch):
    return Step(monkeypatch)


def shuffled(rows, seed):
    """Rows [B, N, width] at random slots of a pool of bytes 0xff: (pool rows [256, width], slots [B, N])."""
    slots = torch.randperm(256, generator=torch.Generator().manual_seed(seed))[: rows.shape[0] * rows.shape[1]]
    pool = torch.full((256, rows.shape[2]), 0xFF, dtype=torch.uint8)
    pool[slots] = rows.flatten(0, 1)
    return pool, slots.view(rows.shape[:2])


@torch.no_grad()
def test_selection_and_attention_are_the_stock_ones(step):
    query, keys, hidden = step.scored
    key_rows = encode_keys(hadamard(keys))
    pool, slots = shuffled(key_rows, seed=2)
    resident = torch.rand(slots.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    listed = slots.masked_fill(~resident, NONE)
    weights = step.scorer.weights_proj(hidden)[:, 0] * step.scorer.weights_scaling * step.scorer.softmax_scale
    scores = score_resident(hadamard(query[:, 0]), weights, rows_to_pages(pool), listed)
    theirs = step.scorer(query, hadamard(decode_keys(key_rows)), hidden)[:, 0].masked_fill(~resident, -torch.inf)
    torch.testing.assert_close(scores, theirs, rtol=1e-4, atol=1e-5)

    chosen = select_resident(scores, listed, 12)
    picks = theirs.topk(12, dim=1).indices
    assert torch.equal(chosen.sort(dim=1).values, slots.gather(1, picks).sort(dim=1).values)

    rows = encode_entries(step.entries[:, 0])
    entry_pool = torch.full((256, V4.bytes), 0xFF, dtype=torch.uint8)
    entry_pool[slots] = rows[:, step.window :]
    window_pool, window = shuffled(rows[:, : step.window], seed=4)
    ours = attend(
        step.query[:, :, 0],
        entries_to_pages(entry_pool),
        chosen,
        entries_to_pages(window_pool),
        window,
        step.module.sinks,
        step.scaling,
    )
    mask = torch.full((2, 1, 1, step.entries.shape[2]), -torch.inf)
    mask[..., : step.window] = 0
    mask[:, 0, 0].scatter_(1, step.window + picks, 0.0)
    entries = decode_entries(rows)[:, None]
    stock_out, _ = step.eager(step.module, step.query, entries, entries, mask, scaling=step.scaling)
    torch.testing.assert_close(ours, stock_out[:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_quantising_costs_little(step):
    keys = step.scored[1]
    near = hadamard(decode_keys(encode_keys(hadamard(keys))))
    assert float((near - keys).norm() / keys.norm()) < 0.04
    entries = step.entries[:, 0]
    near = decode_entries(encode_entries(entries))
    assert float((near - entries).norm() / entries.norm()) < 0.04


@pytest.mark.parametrize("page", [64, 1])
def test_views_into_a_hot_pool_of_all_layers(page):
    """The unit that is fetched holds one layer's keys and entries behind the other's."""
    generator = torch.Generator().manual_seed(6)
    keys, entries = encode_keys(torch.randn(192, 128, generator=generator)), torch.randn(192, V4.width)
    rows = encode_entries(entries)
    units = (rows_to_pages(keys), entries_to_pages(rows)) if page == 64 else (keys, rows)
    key_bytes, entry_bytes = units[0].shape[1], units[1].shape[1]
    hot = HotPool(len(units[0]), (3, key_bytes + entry_bytes), torch.uint8, "cpu")
    hot.slots.fill_(0xFF)
    hot.slots[:, 1] = torch.cat(units, dim=1)
    slots = torch.tensor([[5, 190, 64, NONE]])
    query, weights = torch.randn(1, 2, 128), torch.randn(1, 2)
    scores = score_resident(query, weights, hot.slots[:, 1, :key_bytes], slots, page)
    expected = lightning_scores(query, weights, decode_keys(keys[slots[0, :3]]))
    assert torch.equal(scores[:, :3], expected) and scores[0, 3] == -torch.inf
    query, window = torch.randn(1, 2, V4.width), torch.full((1, 1), NONE)
    out = attend(
        query, hot.slots[:, 1, key_bytes:], slots, entries_to_pages(rows), window, torch.full((2,), -1e9), 0.1, V4, page
    )
    near = decode_entries(rows[slots[0, :3]])
    torch.testing.assert_close(out[0], torch.softmax(0.1 * query[0] @ near.T, dim=1) @ near, rtol=1e-5, atol=1e-6)


def test_ties_fewer_than_k_and_none():
    slots = torch.tensor([[7, 3, NONE, 9, 1], [4, 5, 6, 8, 2]])
    scores = torch.tensor([[1.0, 1.0, -torch.inf, 1.0, 2.0], [0.0, -1.0, 0.0, -2.0, 0.0]])
    assert select_resident(scores, slots, 2).tolist() == [[7, 1], [4, 6]]
    assert select_resident(scores, slots, 4).tolist() == [[7, 3, 9, 1], [4, 5, 6, 2]]
    assert select_resident(scores, slots, 6).tolist() == [[7, 3, 9, 1, NONE, NONE], [4, 5, 6, 8, 2, NONE]]
    with pytest.raises(InputError, match="NaN"):
        select_resident(scores.fill_(torch.nan), slots, 2)


def test_a_token_without_history_attends_to_the_sink_alone():
    pages, none = entries_to_pages(torch.zeros(1, V4.bytes, dtype=torch.uint8)), torch.full((1, 3), NONE)
    out = attend(torch.ones(1, 4, V4.width), pages, none, pages, none, torch.zeros(4), 0.1)
    assert torch.equal(out, torch.zeros(1, 4, V4.width))


def test_damaged_resident_keys_are_refused():
    pages = rows_to_pages(torch.full((64, 132), 0xFF, dtype=torch.uint8))
    with pytest.raises(InputError, match="NaN code"):
        score_resident(torch.ones(1, 2, 128), torch.ones(1, 2), pages, torch.tensor([[5]]))
