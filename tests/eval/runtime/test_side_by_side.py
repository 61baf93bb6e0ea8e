"""Threads, foreign forward passes and broken calls: each answer is that of a call alone, and nothing is left behind."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.tiny_models import tiny
from data_gen.core.errors import InputError
from eval.runtime.correction import Correction
from eval.runtime.runtime import LSARuntime
from indexer_train.selection import Budget
from tests.conftest import TINY, tiny_model
from tests.eval.runtime.indexers import untrained

NEW = 24
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "return_dict_in_generate": True}
FAMILIES = {
    "llama": {},
    "gemma3": {},
    "deepseek_v4": {},
    "deepseek_v32": {},
    "llama corrected": {"correction": Correction(chunks=2)},
}
"""Models, and the options of their runtimes."""
FOREIGN = torch.randint(3, 100, (1, 417), generator=torch.Generator().manual_seed(11))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny(family) if family == "deepseek_v32" else tiny_model(family.split()[0])


@pytest.fixture
def opened(family, model):
    """Opens a runtime of the model."""
    return partial(make_runtime, model, **FAMILIES[family])


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """The registry of attention functions is what it was."""
    functions = ALL_ATTENTION_FUNCTIONS
    before = dict(functions._local_mapping), dict(functions._global_mapping)
    yield
    assert (functions._local_mapping, functions._global_mapping) == before


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def make_runtime(model, **options):
    return LSARuntime(untrained(model), model, selection=Budget(budget=0.2), **options)


def prompt(seed, length=120, rows=1):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def answer(runtime, ids, **options):
    """(ids, logits of the new tokens, chunk keys, windows)."""
    found = runtime.generate(ids, output_logits=True, **GREEDY, **options)
    return found.sequences, torch.stack(found.logits), runtime.host.keys(), runtime.windows


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True)) and found[3] == expected[3]


class InStep:
    """A stopping criterion that never stops: the threads write their tokens in turn, so that all overlap."""

    def __init__(self, threads):
        self.barrier = threading.Barrier(threads, timeout=120)

    def __call__(self, ids, scores, **kwargs):
        self.barrier.wait()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def in_threads(runtimes, prompts):
    step = InStep(len(runtimes))
    with ThreadPoolExecutor(len(runtimes)) as pool:
        jobs = [
            pool.submit(answer, runtime, ids, stopping_criteria=[step])
            for runtime, ids in zip(runtimes, prompts, strict=True)
        ]
        return [job.result() for job in jobs]


@pytest.mark.parametrize("families", [("llama", "qwen3"), ("gemma3", "llama"), ("deepseek_v4", "llama")])
def test_two_models_in_two_threads(families):
    models = [tiny_model(family) for family in families]
    prompts = [prompt(1), prompt(2, 151)]
    expected = [answer(make_runtime(model), ids) for model, ids in zip(models, prompts, strict=True)]
    stock = [model.generate(ids, **GREEDY).sequences for model, ids in zip(models, prompts, strict=True)]
    for _ in range(2):
        found = in_threads([make_runtime(model) for model in models], prompts)
        assert all(map(same, found, expected))
    for model, ids, before in zip(models, prompts, stock, strict=True):
        assert torch.equal(model.generate(ids, **GREEDY).sequences, before)


def test_one_model_in_two_threads(family, model, opened):
    prompts = [prompt(1, rows=1 if FAMILIES[family] else 2), prompt(2, 151)]  # a correction is of one sequence
    expected = [answer(opened(), ids) for ids in prompts]
    for _ in range(2):
        assert all(map(same, in_threads([opened() for _ in prompts], prompts), expected))
    assert hooks_of(model) == 0


def test_the_stock_model_beside_the_runtime(model, opened):
    """In another thread, all the time."""
    ids, other = prompt(1), prompt(2, 60)
    expected, stock = answer(opened(), ids), model.generate(other, **GREEDY).sequences
    over, wrong = threading.Event(), []

    def go_on():
        while not over.is_set():
            if not torch.equal(model.generate(other, **GREEDY).sequences, stock):
                wrong.append("answer")

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(go_on)
        try:
            found = [answer(opened(), ids) for _ in range(3)]
        finally:
            over.set()
        job.result()
    assert not wrong and all(same(each, expected) for each in found)


def test_a_foreign_forward_of_the_same_model_is_not_seen(model, opened):
    """As guidance does: with no cache, with one of its own, with that of another runtime."""
    ids, expected = prompt(1), answer(opened(), prompt(1))
    other, foreign = opened(), DynamicCache(config=model.config)
    answers = []

    def guide(_, scores):
        with torch.no_grad():
            model(FOREIGN)
            model(FOREIGN[:, :3], past_key_values=foreign)
            answers.append(answer(other, prompt(1)))
        return scores

    assert same(answer(opened(), ids, logits_processor=[guide]), expected)
    assert len(answers) == NEW and same(answers[0], expected)


def test_what_reads_into_the_runtimes_own_cache_is_refused(model, opened):
    runtime = opened()

    def guide(_, scores):
        model(FOREIGN[:, :3], past_key_values=runtime.host.cache)
        return scores

    with pytest.raises(InputError, match=r"cache holds 12[23] tokens instead of 1(19|20):|3 tokens at once, but"):
        runtime.generate(prompt(1), logits_processor=[guide], **GREEDY)
    assert same(answer(runtime, prompt(1)), answer(opened(), prompt(1)))


@pytest.mark.parametrize("where", ["processor", "layer", "prompt"])
def test_an_exception_in_the_middle_leaves_nothing(model, opened, where):
    runtime, expected = opened(), answer(opened(), prompt(1))
    stock = model.generate(prompt(1), **GREEDY).sequences

    def stop(*_, **__):
        raise RuntimeError("stopped")

    options, hook = {}, None
    if where == "processor":
        options = {"logits_processor": [stop]}
    else:

        def break_off(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if (hidden.shape[1] > 1) == (where == "prompt"):
                stop()

        block = model.get_decoder().layers[-1].self_attn  # its inputs are known, and its attention never comes
        hook = block.register_forward_pre_hook(break_off, with_kwargs=True)
    with pytest.raises(RuntimeError, match="stopped"):
        runtime.generate(prompt(1), **GREEDY, **options)
    if hook is not None:
        hook.remove()
    assert hooks_of(model) == 0 and torch.equal(model.generate(prompt(1), **GREEDY).sequences, stock)
    assert same(answer(runtime, prompt(1)), expected)


@pytest.mark.parametrize("family", ["llama"])
def test_one_runtime_serves_one_call_at_a_time(opened):
    runtime, expected = opened(), answer(opened(), prompt(1))
    refused = []

    def again(*_, **__):
        for call in (lambda: runtime.generate(prompt(2)), lambda: pool.submit(runtime.generate, prompt(2)).result()):
            with pytest.raises(InputError, match="generating already"):
                call()
            refused.append(call)
        return False

    with ThreadPoolExecutor(1) as pool:
        found = answer(runtime, prompt(1), stopping_criteria=[lambda ids, _: torch.tensor([again()])])
    assert same(found, expected) and len(refused) == 2 * NEW


@torch.no_grad()
def test_a_host_attached_twice_reads_once(model, opened):
    """As whoever keeps it attached over several reads does; a fork is a host of its own."""
    once, twice = opened().host, opened().host
    once.read(prompt(1)[:, :100])
    once.read(prompt(1)[:, 100:])
    with twice.attached():
        twice.read(prompt(1)[:, :100])
        twin = twice.fork()
        twin.read(prompt(2)[:, :9])
        with twice.attached():
            twice.read(prompt(1)[:, 100:])
        assert hooks_of(model) > 0
        with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="another thread is reading with this host"):
            pool.submit(twice.read, prompt(3)).result()
    assert torch.equal(twice.keys(), once.keys()) and torch.equal(twice.hidden(), once.hidden())
    assert twin.keys().shape[1] == 109 // 4 and hooks_of(model) == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_rotary_frequencies_follow_the_length_serves_one_thread(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=2, rope_parameters=rope)).eval()
    first, second = make_runtime(model), make_runtime(model)
    with first.host.attached(), ThreadPoolExecutor(1) as pool:
        with second.host.attached():  # one thread may hold several
            pass
        with pytest.raises(InputError, match="LlamaForCausalLM is being read in another thread"):
            pool.submit(second.generate, prompt(1), **GREEDY).result()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second.generate, prompt(1), **GREEDY).result()  # free again
