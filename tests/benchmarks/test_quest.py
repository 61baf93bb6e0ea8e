"""Pages: bounds, choices and fetches against brute force; with every page on the device, the stock model."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from benchmarks.quest import PagedLayer, paged
from data_gen.backbones.tiny import tiny_backbone

PAGE = 4


def layer(tokens, count, room=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, tokens, 8, generator=draw)
    return keys, values, PagedLayer(keys, values, PAGE, count, room)


def test_a_page_is_ranked_by_the_highest_product_within_its_bounds():
    keys, _, paged_layer = layer(26, count=3)
    query = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(2, 6)
    for head in range(2):
        for page in range(6):
            rows = keys[0, head, page * PAGE : (page + 1) * PAGE]
            low, high = rows.amin(dim=0), rows.amax(dim=0)
            bounds = [torch.maximum(low * q, high * q).sum() for q in query[3 * head : 3 * head + 3]]
            assert all(bound >= (rows @ q).max() - 1e-5 for bound, q in zip(bounds, query[3 * head :], strict=False))
            expected[head, page] = max(bounds)
    assert torch.equal(paged_layer.choose(query), expected.topk(3).indices.sort().values)


def test_the_device_holds_the_chosen_pages_and_only_missing_ones_are_fetched():
    keys, values, paged_layer = layer(26, count=3)
    assert paged_layer.held.tolist() == [[3, 4, 5]] * 2 and paged_layer.fetched == 0
    paged_layer.fetch(torch.tensor([[0, 3, 5], [1, 2, 4]]))
    assert paged_layer.fetched == 1 + 2
    held_keys, held_values = paged_layer.resident()
    for head, pages in enumerate(([0, 3, 5], [1, 2, 4])):
        rows = [row for page in pages for row in range(page * PAGE, (page + 1) * PAGE)] + [24, 25]
        assert torch.equal(held_keys[head], keys[0, head, rows]) and torch.equal(
            held_values[head], values[0, head, rows]
        )


def test_a_page_that_is_filled_goes_to_the_host():
    keys, _, paged_layer = layer(26, count=3)
    more = torch.randn(2, 1, 2, 2, 8, generator=torch.Generator().manual_seed(2))
    for place in range(2):
        assert paged_layer.update(*more[:, :, :, place : place + 1]) == (paged_layer, paged_layer)
    assert paged_layer.get_seq_length() == 28 and paged_layer.tail.shape[1] == 0
    paged_layer.fetch(torch.tensor([[0, 1, 6]] * 2))
    last = torch.cat([keys[0, :, 24:], more[0, 0]], dim=1)
    assert torch.equal(paged_layer.resident()[0][:, -PAGE:], last)
    assert torch.equal(paged_layer.high[:, 6], last.amax(dim=1)) and torch.equal(
        paged_layer.low[:, 6], last.amin(dim=1)
    )


@pytest.fixture(scope="module")
def model():
    return tiny_backbone()[0]


@torch.no_grad()
def read(model, share, dense, tokens=90, follow=12):
    ids = torch.randint(1, 128, (1, tokens + follow), generator=torch.Generator().manual_seed(3))
    cache, logits = DynamicCache(config=model.config), []
    model(ids[:, :tokens], past_key_values=cache)
    with paged(model, cache, [0, 1, 2], page=PAGE, share=share, room=follow, dense=dense) as layers:
        for place in range(tokens, tokens + follow):
            positions = torch.tensor([[place]])
            logits.append(model(ids[:, place : place + 1], past_key_values=cache, position_ids=positions).logits[0, 0])
    whole = model(ids).logits[0, tokens:]
    return torch.stack(logits), whole, layers


@pytest.mark.parametrize("dense", [0, 2])
def test_with_every_page_it_is_the_stock_model(model, dense):
    before = model.config._attn_implementation
    logits, whole, layers = read(model, 2.0, dense)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert len(layers) == 3 - dense and model.config._attn_implementation == before


def test_the_share_is_kept_and_pages_come_from_the_host(model):
    logits, whole, layers = read(model, 0.3, 0)
    assert not torch.allclose(logits, whole, rtol=1e-2, atol=1e-2)
    for each in layers:
        assert each.held.shape[1] == round((0.3 * 90 - 2) / PAGE) and each.fetched > 0
    with pytest.raises(ValueError, match="does not hold a page beside 1 of 3 whole layers"):
        read(model, 0.3, 1)
