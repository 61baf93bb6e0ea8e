"""Under a restricted set the model equals the stock model whose attention cannot reach the evicted chunks."""

import pytest
import torch
from transformers import DynamicCache

from data_gen.core.errors import InputError
from eval.runtime.hosts.deepseek_v4 import ResidentCsaCache, resident_masks
from tests.conftest import tiny_model
from tests.eval.runtime.hosts.masked_v4 import masked

IDS = torch.randint(0, 128, (3, 190), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def model():
    return tiny_model("deepseek_v4")


@torch.no_grad()
def compare(model, ids, prefill, turns):
    """Largest difference of logits over turns of (resident set or None a sequence, sizes of the pieces that follow)."""
    ours, stock = ResidentCsaCache(model.config), DynamicCache(config=model.config)
    with resident_masks(model):
        model(ids[:, :prefill], past_key_values=ours)
    model(ids[:, :prefill], past_key_values=stock)
    at, worst, changed = prefill, 0.0, 0.0
    for sets, pieces in turns:
        total = ours.total
        ours.keep([torch.tensor(chunks, dtype=torch.int64) for chunks in sets])
        evicted = [sorted(set(range(total)) - set(chunks)) for chunks in sets]
        for size in pieces:
            part = ids[:, at : at + size]
            with resident_masks(model):
                found = model(part, past_key_values=ours).logits
            with masked(model, evicted):
                expected = model(part, past_key_values=stock).logits
            worst = max(worst, float((found - expected).abs().max()))
            changed = max(changed, float((found - model(ids[:, : at + size]).logits[:, -size:]).abs().max()))
            at += size
    assert changed > 0.1  # what left was missed
    return worst


EVEN = [list(range(0, 25, 2)), list(range(12)), [3]]


@pytest.mark.parametrize(
    ("batch", "turns"),
    [
        (1, [([[0, 3, 7, 8, 9, 20, 24]], [1] * 30)]),
        (1, [([[0, 24]], [1] * 7), ([[1, 2, 5, 24, 25]], [1] * 9), ([list(range(29))], [1] * 9)]),
        (1, [([[2, 11, 12, 19]], [23, 5, 1, 30])]),  # several tokens at once over a restricted set
        (1, [([[]], [1, 1, 1, 1, 1, 9])]),
        (3, [([[0, 5, 6], [1, 7, 20], [22, 23, 24]], [1] * 12), ([[0, 5, 6], [1, 7, 20], [4, 5, 27]], [13, 1, 1])]),
        (3, [(EVEN, [1] * 12), ([[1], [0, 9, 17, 26], []], [1, 17, 1, 1])]),  # different numbers of chunks
    ],
    ids=["decode", "windows", "pieces", "nothing", "batch", "ragged"],
)
def test_restricted_equals_the_masked_stock_model(model, batch, turns):
    assert compare(model, IDS[:batch], 100, turns) < 1e-4


def test_masks_change_no_bit_of_others(model):
    with torch.no_grad():
        before = model(IDS[:1]).logits
        stock = model(IDS[:1], past_key_values=DynamicCache(config=model.config)).logits
        with resident_masks(model):
            assert torch.equal(model(IDS[:1]).logits, before)
            assert torch.equal(model(IDS[:1], past_key_values=ResidentCsaCache(model.config)).logits, stock)
            padded = torch.ones(1, 190).index_fill(1, torch.arange(3), 0)
            model(IDS[:1], attention_mask=padded, past_key_values=DynamicCache(config=model.config))
        assert torch.equal(model(IDS[:1]).logits, before)


def test_padding_is_refused(model):
    mask = torch.ones(2, 10, dtype=torch.int64)
    with resident_masks(model), torch.no_grad():
        model(IDS[:2, :10], attention_mask=mask, past_key_values=ResidentCsaCache(model.config))
        mask[0, :2] = 0
        with pytest.raises(InputError, match="a padded batch: DeepSeek-V4 compresses padding"):
            model(IDS[:2, :10], attention_mask=mask, past_key_values=ResidentCsaCache(model.config))


def test_beam_search_with_everything_resident(model):
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones(2, 60)}
    with resident_masks(model):
        ours = model.generate(IDS[:2, :60], past_key_values=ResidentCsaCache(model.config), **settings)
    assert torch.equal(ours, model.generate(IDS[:2, :60], **settings))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu():
    model = tiny_model("deepseek_v4").to("cuda")
    turns = [([[0, 5, 6], [1, 7], [22, 23, 24]], [1] * 12), ([[0, 5, 6], [1, 7, 20], []], [13, 1, 1])]
    assert compare(model, IDS.to("cuda"), 100, turns) < 1e-4
    cache = ResidentCsaCache(model.config)
    with torch.no_grad():
        for part in IDS.to("cuda").split(50, dim=1):
            ours = model(part, past_key_values=cache).logits
    assert (
        cache.index_entries(0).device.type == "cpu"
        and cache.layers[1].compressed_kv["compressor"].is_cuda
        and ours.isfinite().all()
    )
