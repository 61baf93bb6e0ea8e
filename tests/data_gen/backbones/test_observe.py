"""Observations that overlap: each reports its own calls, and the registry of attention functions stays what it was."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data_gen.backbones.deepseek_v4_hooks import observe_csa
from data_gen.backbones.observe import observe
from tests.conftest import tiny_model

IDS = torch.randint(0, 128, (1, 60), generator=torch.Generator().manual_seed(1))
FUNCTIONS = ALL_ATTENTION_FUNCTIONS


@pytest.fixture(autouse=True)
def registry():
    """The registry, unchanged in the end."""
    before = dict(FUNCTIONS._local_mapping), dict(FUNCTIONS._global_mapping)
    yield
    assert (FUNCTIONS._local_mapping, FUNCTIONS._global_mapping) == before


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_first_to_begin_may_be_the_first_to_end(attention):
    models = [tiny_model("llama"), tiny_model("qwen3")]
    for model in models:
        model.set_attn_implementation(attention)
    seen = [[], []]
    first, second = (ExitStack() for _ in models)
    first.enter_context(observe(models[0], seen[0].append))
    second.enter_context(observe(models[1], seen[1].append))
    first.close()
    plain = [model(IDS).logits for model in models]  # the first one unseen, the second seen
    second.close()
    assert not seen[0] and len(seen[1]) == len(models[1].model.layers)
    for model, logits in zip(models, plain, strict=True):
        assert torch.equal(model(IDS).logits, logits)


@torch.no_grad()
def test_what_replaced_an_attention_function_stays():
    """Somebody's own function, put there before or meanwhile."""
    model, calls = tiny_model("llama"), []
    stock = FUNCTIONS["sdpa"]

    def own(*args, **kwargs):
        calls.append("own")
        return stock(*args, **kwargs)

    FUNCTIONS["sdpa"] = own
    try:
        with observe(model, lambda _: calls.append("seen")):
            model(IDS)
        assert FUNCTIONS["sdpa"] is own and calls == ["own", "seen"] * len(model.model.layers)
        del FUNCTIONS["sdpa"]
        with observe(model, calls.append):
            FUNCTIONS["sdpa"] = own
        assert FUNCTIONS["sdpa"] is own
    finally:
        del FUNCTIONS["sdpa"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "deepseek_v4"])
def test_calls_of_other_threads_are_not_reported(family):
    model = tiny_model(family)
    if family == "deepseek_v4":
        model.set_attn_implementation("eager")
    watch = observe_csa if family == "deepseek_v4" else observe
    lengths = [[], []]
    start = threading.Barrier(2, timeout=60)

    def read(which):
        """Several times over, so that hooks come and go while the other reads."""
        start.wait()
        for _ in range(10):
            with watch(model, lambda call: lengths[which].append(call.hidden.shape[-2])):
                model(IDS[:, : 40 + which], past_key_values=DynamicCache(config=model.config))

    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(torch.no_grad()(read), which) for which in range(2)]
        for job in jobs:
            job.result()
    assert set(lengths[0]) == {40} and set(lengths[1]) == {41} and len(lengths[0]) == len(lengths[1])


@torch.no_grad()
def test_only_what_reads_into_the_cache_is_reported():
    model, seen, cache = tiny_model("llama"), [], DynamicCache()
    with observe(model, seen.append, cache):
        model(IDS)
        model(IDS, past_key_values=DynamicCache())
        assert not seen
        model(IDS[:, :7], past_key_values=cache)
    assert [call.hidden.shape[1] for call in seen] == [7] * len(model.model.layers)


@torch.no_grad()
def test_a_call_that_was_broken_off_leaves_nothing():
    model, seen = tiny_model("llama"), []

    def stop(*_):
        raise RuntimeError("stopped")

    with observe(model, seen.append):
        hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            model(IDS)
        hook.remove()
        model(IDS[:, :9])
    assert [call.hidden.shape[1] for call in seen] == [60] + [9] * len(model.model.layers)
