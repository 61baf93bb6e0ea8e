"""With everything resident the cache is the stock cache, bit for bit; moving entries out and back loses nothing."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys
from eval.runtime.hosts.deepseek_v4 import KeyPages, ResidentCsaCache
from eval.serving.level1 import PagedKeys
from tests.conftest import TINY_V4, tiny_model

IDS = torch.randint(0, 128, (3, 150), generator=torch.Generator().manual_seed(5))
PIECES = {"one": [150], "chunked": [50, 37, 3, 60], "decode": [97, *[1] * 53], "turns": [70, *[1] * 11, 45, *[1] * 24]}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    half = DeepseekV4ForCausalLM(DeepseekV4Config(**copy.deepcopy(TINY_V4), dtype="bfloat16")).eval()
    return {"fp32": tiny_model("deepseek_v4"), "bf16": half.to(torch.bfloat16)}


@torch.no_grad()
def read(model, cache, ids, pieces):
    """Logits of every token, read piece by piece."""
    parts = ids.split(pieces, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_everything_resident_is_the_stock_model(models, dtype, batch, pieces):
    model = models[dtype]
    ids, sizes = IDS[:batch], PIECES[pieces]
    cache = ResidentCsaCache(model.config)
    ours = read(model, cache, ids, sizes)
    assert torch.equal(ours, read(model, DynamicCache(config=model.config), ids, sizes))
    assert cache.total == 150 // 4
    cache.reset()
    assert cache.total == 0 and torch.equal(read(model, cache, ids, sizes), ours)


def test_leaving_and_returning_loses_no_bit(models):
    for model in models.values():
        cache, ids = ResidentCsaCache(model.config), IDS[:2]
        read(model, cache, ids[:, :110], [110])
        layers = [cache.layers[layer] for layer in cache.csa]
        before = [{name: hot.clone() for name, hot in layer.compressed_kv.items()} for layer in layers]
        few, all_chunks = torch.tensor([0, 3, 26]), torch.arange(27)
        gone = cache.keep([few, few])
        assert (gone.fetched, gone.evicted) == (0, 48)
        cache.keep([few[:0], few[:0]])
        for layer in layers:
            for hot in layer.compressed_kv.values():
                assert hot.shape[1] == 0
        back = cache.keep([few, few])
        assert (back.fetched, back.evicted) == (6, 0)
        for layer in layers:
            for hot in layer.compressed_kv.values():
                hot.fill_(torch.nan)
        # What stays is not fetched, so poison stays with it: all else must come from the cold side.
        others = torch.tensor([chunk for chunk in range(27) if chunk not in few])
        cache.keep([others, others])
        cache.keep([all_chunks, all_chunks])
        for layer, entries in zip(layers, before, strict=True):
            for name, hot in layer.compressed_kv.items():
                assert torch.equal(hot, entries[name])
        stock = DynamicCache(config=model.config)
        read(model, stock, ids[:, :110], [110])
        after = read(model, cache, ids[:, 110:], [1] * 40)
        assert torch.equal(after, read(model, stock, ids[:, 110:], [1] * 40))


def test_new_chunks_join_and_stay(models):
    model = models["fp32"]
    cache = ResidentCsaCache(model.config)
    read(model, cache, IDS[:2, :62], [62])
    cache.keep([torch.tensor([0, 14]), torch.tensor([2, 3, 9])])
    read(model, cache, IDS[:2, 62:73], [1] * 11)
    assert [row.tolist() for row in cache.resident()] == [[0, 14, 15, 16, 17], [2, 3, 9, 15, 16, 17]]
    hot = cache.layers[1].compressed_kv["indexer"]
    cold = [cache.index_entries(sequence)[:, 0, 0] for sequence in range(2)]
    assert torch.equal(hot[0, 1:], cold[0][[0, 14, 15, 16, 17]])  # one row of padding in front
    assert torch.equal(hot[1], cold[1][[2, 3, 9, 15, 16, 17]])
    assert cache.resident_bytes() == 4 * 2 * 6 * (32 + 16) * 4


def test_reordered_sequences_keep_their_own_chunks(models):
    model = models["fp32"]
    cache = ResidentCsaCache(model.config)
    read(model, cache, IDS[:, :62], [62])
    cache.keep([torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])])
    cold = torch.stack([cache.cold.units(sequence)[:, 0, :32] for sequence in range(3)])
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert [row.tolist() for row in cache.resident()] == [[4, 5], [4, 5], [0, 1]]
    cache.keep([torch.arange(15)] * 3)
    assert torch.equal(cache.layers[1].compressed_kv["compressor"], cold[[2, 2, 0], :15])


def test_forks_go_their_own_ways(models):
    model = models["fp32"]
    cache, ids = ResidentCsaCache(model.config, [0, 3]), IDS[:2]
    read(model, cache, ids[:, :62], [62])
    cache.key_pages()
    cache.keep([torch.arange(12)] * 2)
    twin, third = cache.fork(), cache.fork()
    twin.keep([torch.arange(3, 9)] * 2)
    read(model, twin, ids[:, 80:110], [1] * 30)
    ours = read(model, cache, ids[:, 62:92], [1] * 30)
    assert torch.equal(read(model, third, ids[:, 62:92], [1] * 30), ours)
    assert not torch.equal(cache.index_entries(0), twin.index_entries(0))
    assert torch.equal(cache.index_entries(0), third.index_entries(0))
    assert torch.equal(cache.key_pages().rows(), third.key_pages().rows())
    assert torch.equal(cache.key_pages().rows()[:, :15], twin.key_pages().rows()[:, :15])
    assert len(cache.resident()[0]) == 12 + 8 and len(twin.resident()[0]) == 6 + 8


@pytest.mark.parametrize("shared", [False, True])
def test_pages_of_a_growing_history_are_those_of_the_whole_one(shared):
    """However it arrives; in few widths, and what a fork goes on from stays its own."""
    rows = torch.randint(0, 256, (2, 300, 3, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys, widths, forks = KeyPages(), [], []
    for first, last in pairwise([0, 0, 1, 64, 65, 129, 190, 193, 300]):
        if shared:
            forks.append((keys.fork(), first))
        keys.append(rows[:, first:last])
        paged = keys.paged()
        widths.append(paged.table.shape[1])
        for sequence in range(2):
            assert not last or torch.equal(paged.rows(sequence, 0, last), rows[sequence, :last])
            whole = PagedKeys.from_rows(rows[sequence, :last])
            assert torch.equal(paged.pages[paged.table[sequence, : len(whole.pages)].long()], whole.pages)
        assert torch.equal(keys.rows(), rows[:, :last])
    assert widths == [1, 1, 1, 2, 4, 4, 4, 8]
    for fork, chunks in forks[1:]:
        fork.append(rows[:, :7])
        assert torch.equal(fork.rows(), torch.cat([rows[:, :chunks], rows[:, :7]], dim=1))
    keys.reorder(torch.tensor([1, 1]))
    assert torch.equal(keys.rows(), rows[[1, 1]])


def test_only_new_chunks_are_encoded_and_paged(models, monkeypatch):
    """A refresh costs what came since the one before, not the history."""
    model, encoded = models["fp32"], []
    monkeypatch.setattr(
        "eval.runtime.hosts.deepseek_v4.encode_keys", lambda keys: encoded.append(keys.shape[1]) or encode_keys(keys)
    )
    cache = ResidentCsaCache(model.config, [0, 3])
    read(model, cache, IDS[:2, :100], [100])
    before = cache.key_pages().pages
    read(model, cache, IDS[:2, 100:120], [1] * 20)
    assert cache.key_pages().pages is before and encoded == [25, 5]


def test_taking_tokens_back_is_refused(models):
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        ResidentCsaCache(models["fp32"].config).crop(-1)


def test_the_stock_cache_of_others_stays_stock(models):
    layer = DynamicCache(config=models["fp32"].config).layers[1]
    assert type(layer) is DeepseekV4CSACache


@pytest.mark.parametrize("chunks", [[3, 2], [1, 1], [-1, 2], [4, 15]])
def test_bad_sets_are_named(models, chunks):
    cache = ResidentCsaCache(models["fp32"].config)
    read(models["fp32"], cache, IDS[:1, :62], [62])
    with pytest.raises(InputError, match="sequence 0: must be ascending, without repeats, below 15"):
        cache.keep([torch.tensor(chunks)])
    with pytest.raises(InputError, match="2 resident sets, but the cache holds 1 sequences"):
        cache.keep([torch.arange(3)] * 2)
