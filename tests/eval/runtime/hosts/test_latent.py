"""Hosts of models with MLA and DSA in batches, as those of dense models: bitwise stock, or the masked stock model."""

import pytest
import torch
from transformers import DynamicCache

from benchmarks.tiny_models import tiny
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.dsa import DsaHost
from tests.eval.runtime.hosts.test_dense import DIFFERENT, IDS, PROMPT, SIZE, check_masked

KINDS = {"deepseek_v3": DenseHost, "deepseek_v32": DsaHost}
EQUAL = [torch.tensor([0, 5, 9, 20, 21]), torch.tensor([1, 2, 3, 4, 19])]


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param)


def open_host(model):
    return KINDS[model.config.model_type](model, SIZE, [0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 3])
def test_everything_resident_is_bitwise_stock(model, dtype, batch):
    model = model.to(dtype)
    host, stock = open_host(model), DynamicCache(config=model.config)
    place = 0
    for new in (64, 26, *[1] * 6, 20, 1):  # chunked prefill, decoding, a second turn
        piece = IDS[:batch, place : place + new]
        assert torch.equal(host.read(piece), model(piece, past_key_values=stock, logits_to_keep=1).logits[:, -1])
        place += new
        if place == PROMPT:
            gone = host.keep([torch.arange(18, 22)] * batch)
            assert gone.evicted == host.keep([torch.arange(22)] * batch).fetched == 18 * batch


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sets", [EQUAL, DIFFERENT], ids=["as many", "different numbers"])
def test_restricted_sets_are_the_masked_stock_model(model, sets, attention):
    model.set_attn_implementation(attention)
    host, stock, batch = open_host(model), DynamicCache(config=model.config), len(sets)
    host.read(IDS[:batch, :PROMPT])
    model(IDS[:batch, :PROMPT], past_key_values=stock)
    assert host.keep(sets).evicted == 22 * batch - sum(map(len, sets))
    check_masked(model, host, stock, sets)
