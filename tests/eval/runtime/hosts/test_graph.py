"""The step of fixed memory against what it stands for: the same runtime without it, and the stock model."""

import pytest
import torch

from benchmarks.tiny_models import tiny
from data_gen.core.errors import InputError
from eval.runtime.correction import Correction
from eval.runtime.hosts import graph
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.graph import GraphHost
from eval.runtime.hosts.step import TURNS
from eval.runtime.runtime import LSARuntime
from eval.serving.select import Fallback, Limits
from indexer_train.selection import Budget, Cut, Threshold
from tests.conftest import tiny_model
from tests.eval.runtime.indexers import untrained

FIFTH = Budget(budget=0.2)
GREEDY = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return request.param


@pytest.fixture(params=["gemma3", "qwen3", "llama"])
def model(request, device):
    return tiny_model(request.param).to(device)


gemma = pytest.mark.parametrize("model", ["gemma3"], indirect=True)


def prompt(length, rows, device):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(length)).to(device)


def both(model, **options):
    """A runtime as it is, and one with a step."""
    return [LSARuntime(untrained(model), model, graph=graph, **options) for graph in (False, True)]


def compare(eager, stepped, ids, new):
    """Tokens, windows and resident chunks of a turn are equal, logits nearly; returns what was written."""
    expected, found = (runtime.generate(ids, max_new_tokens=new, **GREEDY) for runtime in (eager, stepped))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert stepped.windows == eager.windows and stepped.host.cache._step is not None
    for ours, theirs in zip(stepped.host.cache.resident(), eager.host.cache.resident(), strict=True):
        assert torch.equal(ours, theirs)
    return found.sequences


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_tokens_and_sets_are_those_without_a_step(model, device, rows, lag):
    """Six windows, a second turn that reads several tokens at once, and another conversation."""
    eager, stepped = both(model, selection=FIFTH, lag=lag)
    written = compare(eager, stepped, prompt(150, rows, device), 45)
    compare(eager, stepped, torch.cat([written, prompt(9, rows, device)], dim=1), 20)
    assert sum(window.fetched for window in stepped.windows) > 0
    compare(eager, stepped, prompt(11, rows, device), 40)  # shorter than the sliding window at first


def test_everything_resident_is_the_models_own_generate(model, device):
    ids, options = prompt(150, 2, device), {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}
    runtime = LSARuntime(untrained(model), model, selection=Budget(budget=1.0), graph=True)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(runtime.generate(ids, **options), expected)
    assert "forward" not in vars(model)


def test_sequences_may_keep_different_numbers_of_chunks(model, device):
    """And a set may be fixed at any token, in the middle of a chunk."""
    ids = prompt(64, 2, device)
    hosts = [kind(model, 4, [1]) for kind in (DenseHost, GraphHost)]
    follow = prompt(30, 2, device)
    sets = [[torch.tensor([0, 3, 9]), torch.arange(11)], [torch.arange(5, 15), torch.tensor([14])]]
    for host in hosts:
        host.read(ids)
    for start, wanted in zip((0, 10, 20), [*sets, [torch.arange(21)] * 2], strict=True):
        moves = [host.keep(wanted) for host in hosts]
        assert moves[0].fetched == moves[1].fetched
        for token in follow[:, start : start + 10].split(1, dim=1):
            expected, found = (host.read(token) for host in hosts)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        keys, hidden = ([getattr(host, name)() for host in hosts] for name in ("keys", "hidden"))
        torch.testing.assert_close(keys[1], keys[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(hidden[1], hidden[0], atol=2e-2, rtol=2e-2)


@gemma
def test_the_rows_of_a_step_grow_and_shrink_with_what_is_resident(model, device, monkeypatch):
    """Each token's logits are the stock model's while all is resident, over many more tokens than are held back."""
    monkeypatch.setattr(graph, "SPAN", 16)
    ids = prompt(400, 1, device)
    host = GraphHost(model, 4, [1])
    with torch.no_grad():
        expected = model(ids).logits[0]
    host.read(ids[:, :50])
    rows = []
    for place in range(50, 50 + 2 * TURNS + 20):
        logits = host.read(ids[:, place : place + 1])
        torch.testing.assert_close(logits[0], expected[place], atol=1e-4, rtol=1e-4)
        rows.append(host.cache._step.rows)
    assert rows[0] < rows[TURNS + 20] < rows[-1]
    before = host.cache._step
    host.keep([torch.arange(2)])
    host.read(ids[:, :1])
    assert host.cache._step is not before and host.cache._step.rows < rows[0]


@gemma
def test_a_window_under_full_attention_is_like_any_other(model, device):
    """Demand fallback: sets of all sizes, one after the other."""
    cut = Threshold(cuts=[Cut(score=0.1)])
    compare(*both(model, selection=cut, limits=Limits(cap=10), fallback=Fallback()), prompt(150, 2, device), 30)


@gemma
def test_a_model_that_changed_is_captured_again(model, device):
    ids = prompt(60, 1, device)
    eager, stepped = both(model, selection=FIFTH)
    written = compare(eager, stepped, ids, 12)
    block = model.model.layers[0].mlp
    block.up_proj.weight = torch.nn.Parameter(-block.up_proj.weight)
    again = compare(eager, stepped, torch.cat([written, ids[:, :5]], dim=1), 12)
    fresh = LSARuntime(untrained(model), model, selection=FIFTH)
    assert torch.equal(fresh.generate(again[:, :-12], max_new_tokens=12, **GREEDY).sequences, again)


@gemma
def test_attention_without_sdpa(model, device):
    model.set_attn_implementation("eager")
    compare(*both(model, selection=FIFTH), prompt(100, 2, device), 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_replays_one_graph_over_many_windows():
    model = tiny_model("gemma3").to("cuda")
    runtime = LSARuntime(untrained(model), model, selection=FIFTH, graph=True)
    ids = prompt(150, 2, "cuda")
    written = runtime.generate(ids, max_new_tokens=2, **GREEDY).sequences
    captured = runtime.host.cache._step._graph
    runtime.generate(torch.cat([written, ids[:, :4]], dim=1), max_new_tokens=60, **GREEDY)
    assert captured is not None and runtime.host.cache._step._graph is captured


def test_what_a_step_cannot_read_is_refused_by_name():
    dynamic, flex = tiny_model("llama"), tiny_model("llama")
    dynamic.model.rotary_emb.rope_type = "dynamic"
    flex.config._attn_implementation = "flex_attention"
    refused = [
        (tiny_model("deepseek_v4"), "DeepseekV4ForCausalLM .* picks among"),
        (tiny_model("deepseek_v32"), "DeepseekV32ForCausalLM .* picks among"),
        (tiny("deepseek_v3"), r"DeepseekV3ForCausalLM .* latents \(MLA\)"),
        (tiny("qwen3_next"), "Qwen3NextForCausalLM .* layers beside full .*linear_attention"),
        (tiny("llama4_text"), "Llama4ForCausalLM .* layers beside full .*chunked_attention"),
        (dynamic, "LlamaForCausalLM .* length of the text"),
        (flex, "LlamaForCausalLM .* `flex_attention` takes no mask"),
    ]
    for model, words in refused:
        with pytest.raises(InputError, match=words):
            GraphHost(model, 4, [])
    with pytest.raises(InputError, match=r"graph: LlamaForCausalLM .* correction"):
        GraphHost(tiny_model("llama"), 4, [0], correction=Correction(chunks=2))
    with pytest.raises(InputError, match=r"graph: .* no forks"):
        GraphHost(tiny_model("llama"), 4, [0]).fork()


def test_a_step_whose_length_would_be_frozen_is_refused(monkeypatch):
    """A model that asks its cache for the length, or has its own way to a mask, would be replayed at one length."""
    model = tiny_model("llama")
    forward = type(model.model).forward

    def asks(self, *args, past_key_values=None, **kwargs):
        past_key_values.get_seq_length()
        return forward(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(model.model, "forward", asks.__get__(model.model))
    host = GraphHost(model, 4, [0])
    host.read(prompt(9, 1, "cpu"))
    with pytest.raises(InputError, match=r"asks for the length .* leave graph out"):
        host.read(prompt(1, 1, "cpu"))
