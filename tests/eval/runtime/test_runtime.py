"""The public runtime: the model's own generate, with a resident set that is refreshed every tau tokens."""

import json

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from data_gen.core.errors import InputError
from eval.online.cycle import Course, go_on
from eval.online.online_policies import ONLINE_POLICIES, Circumstances, Foresight
from eval.online.session import DenseSession
from eval.runtime.correction import Correction
from eval.runtime.runtime import HOSTS, LSARuntime
from eval.serving.select import Fallback, Limits
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from tests.conftest import TINY_OF, tiny_model
from tests.eval.runtime.indexers import untrained

EVERYTHING, TENTH = Budget(budget=1.0), Budget(budget=0.1)


@pytest.fixture(scope="module", params=["qwen3", "gemma3", *map(TINY_OF.get, HOSTS)])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def indexer(model):
    return untrained(model)


def prompt(length, rows=1):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(length))


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


two_families = pytest.mark.parametrize("model", ["llama", "deepseek_v4"], indirect=True)
one_family = pytest.mark.parametrize("model", ["llama"], indirect=True)
FEW = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
GREEDY = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [GREEDY, GREEDY | {"do_sample": True, "temperature": 0.8, "top_k": 5}])
def test_everything_resident_is_the_models_own_generate(model, indexer, rows, options):
    ids = prompt(150, rows)
    runtime = LSARuntime(indexer, model, selection=EVERYTHING)
    torch.manual_seed(1)
    expected = generate(model, ids, **options)
    torch.manual_seed(1)
    assert torch.equal(runtime.generate(ids, **options), expected)
    assert [window.position for window in runtime.windows] == [148, 156, 164, 172]
    assert all(window.evicted == window.fetched == 0 for window in runtime.windows)
    assert all(window.resident == rows * window.chunks for window in runtime.windows)


def test_a_second_turn_reads_only_what_is_new_and_all_of_it_in_full(model, indexer, monkeypatch):
    runtime = LSARuntime(indexer, model, selection=TENTH)
    first = runtime.generate(prompt(150), **GREEDY | {"max_new_tokens": 1})  # nothing sparse is in the history yet
    second = torch.cat([first, prompt(40)], dim=1)
    read = []
    plain = runtime.host.read
    monkeypatch.setattr(runtime.host, "read", lambda ids: read.append(ids.shape[1]) or plain(ids))
    runtime.generate(second, **GREEDY)
    assert read == [second.shape[1] - 1 - 150]
    fresh = LSARuntime(indexer, model, selection=TENTH)
    fresh.generate(second, **GREEDY)
    assert runtime.windows[1].chunks == fresh.windows[0].chunks
    runtime.generate(prompt(60), **GREEDY)  # another conversation starts anew
    assert runtime.windows[0].position == 58


@two_families
@pytest.mark.parametrize("end", [None, -1, -2])
def test_turns_are_the_models_own_wherever_the_next_prompt_ends(model, indexer, end, monkeypatch):
    """-1: all of it was read before, so that no token is left to read; -2: fewer than were read."""
    runtime = LSARuntime(indexer, model, selection=EVERYTHING)
    first = runtime.generate(prompt(30), **FEW)
    read = []
    plain = runtime.host.read
    monkeypatch.setattr(runtime.host, "read", lambda ids: read.append(ids.shape[1]) or plain(ids))
    second = torch.cat([first, prompt(9)], dim=1) if end is None else first[:, :end]
    assert torch.equal(runtime.generate(second, **FEW), generate(model, second, **FEW))
    assert read == [9 if end is None else second.shape[1] - 1]
    runtime.generate(second, **FEW | {"max_new_tokens": 1})
    assert torch.equal(runtime.generate(second, **FEW), generate(model, second, **FEW))


@two_families
@pytest.mark.parametrize("broken", ["keep", "read", "generate"])
def test_a_turn_after_one_that_was_broken_off_is_the_models_own(model, indexer, broken, monkeypatch):
    runtime = LSARuntime(indexer, model, selection=EVERYTHING)
    first = runtime.generate(prompt(30), **FEW)
    second = torch.cat([first, prompt(9)], dim=1)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if broken != "generate":
            patch.setattr(runtime.host, broken, stop)
        runtime.generate(second, stopping_criteria=[stop], **FEW)
    assert torch.equal(runtime.generate(second, **FEW), generate(model, second, **FEW))


def test_windows_are_counted_and_saved(model, indexer, tmp_path):
    runtime = LSARuntime(indexer, model, selection=TENTH)
    runtime.generate(prompt(200, 2), **GREEDY)
    first = runtime.windows[0]
    assert first.chunks == 49 and first.resident == 2 * (4 + 3) and first.evicted == 2 * 49 - first.resident
    assert first.fetched == first.fetched_bytes == 0 and first.demand == [4, 4] and first.served == ["demand"] * 2
    for before, after in zip(runtime.windows, runtime.windows[1:], strict=False):
        # New chunks joined the resident ones and were never evicted inside the window.
        held = before.resident + 2 * (after.chunks - before.chunks)
        assert after.resident == held + after.fetched - after.evicted
    runtime.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["tau"] == 8 and len(trace["windows"]) == trace["totals"]["windows"] == 4
    assert trace["totals"]["fetched_bytes"] == sum(window.fetched_bytes for window in runtime.windows) > 0


@pytest.mark.parametrize(
    ("asks_all", "asks_little", "little_is"),
    [
        (Threshold(cuts=[Cut(score=-1e9)]), Threshold(cuts=[Cut(score=1e9)]), 0),
        (Coverage(share=1.0), Coverage(share=1e-9), 1),
    ],
    ids=["threshold", "coverage"],
)
def test_demand_above_the_cap_gets_what_the_cap_allows_or_full_attention(
    model, indexer, asks_all, asks_little, little_is
):
    ids = prompt(200)
    capped = LSARuntime(indexer, model, Limits(cap=10), asks_all)
    capped.generate(ids, **GREEDY)
    assert {window.served[0] for window in capped.windows} == {"cap"}
    assert all(window.resident == 10 for window in capped.windows)
    full = LSARuntime(indexer, model, Limits(cap=10), asks_all, Fallback())
    assert torch.equal(full.generate(ids, **GREEDY), generate(model, ids, **GREEDY))
    assert all(window.served == ["full"] and window.resident == window.chunks for window in full.windows)
    patient = LSARuntime(indexer, model, Limits(cap=10), asks_all, Fallback(full_above=100))
    patient.generate(ids, **GREEDY)
    assert {window.served[0] for window in patient.windows} == {"cap"}
    little = LSARuntime(indexer, model, Limits(cap=10), asks_little, Fallback())
    little.generate(ids, **GREEDY)
    assert all(window.served == ["demand"] and window.demand == [little_is] for window in little.windows)


@one_family
@pytest.mark.parametrize(
    ("ids", "options", "what"),
    [
        (prompt(40)[0], {}, "input_ids: \\[40\\]"),
        (prompt(40)[:0], {}, "input_ids: \\[0, 40\\]"),
        (prompt(40)[:, :1], {}, "at least two tokens"),
        (prompt(40), {"attention_mask": torch.ones(1, 41)}, "attention_mask: \\[1, 41\\]"),
        (prompt(40), {"attention_mask": torch.arange(40)[None]}, "padding"),
        (prompt(40), {"num_beams": 2}, "num_beams"),
        (prompt(40), {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        (prompt(40), {"generation_config": GenerationConfig(num_beams=2)}, "num_beams"),
        (prompt(40), {"generation_config": GenerationConfig(use_cache=False)}, "use_cache"),
        (prompt(40), {"use_cache": False}, "use_cache"),
        (prompt(40), {"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        (prompt(40), {"assistant_model": "another"}, "assistant_model"),
        (prompt(40), {"past_key_values": DynamicCache()}, "past_key_values"),
        (prompt(40), {"cache_implementation": "static"}, "cache_implementation"),
        (prompt(40), {"inputs_embeds": torch.zeros(1, 40, 32)}, "inputs_embeds"),
        (prompt(40), {"guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_what_generate_cannot_do_is_refused_by_name(model, indexer, ids, options, what):
    with pytest.raises(InputError, match=what):
        LSARuntime(indexer, model, selection=TENTH).generate(ids, **options)


@pytest.mark.parametrize("where", ["options", "generation_config", "the model"])
@pytest.mark.parametrize("name", ["max_new_tokens", "max_length"])
def test_the_context_is_never_left(model, indexer, monkeypatch, where, name):
    runtime = LSARuntime(indexer, model, selection=TENTH)
    context, ids = runtime.host.info.context, prompt(40)

    def ask(tokens):
        asked, options = {name: tokens - 40 if name == "max_new_tokens" else tokens}, {}
        if where == "the model":
            monkeypatch.setattr(model.generation_config, name, asked[name])
        else:
            options = asked if where == "options" else {"generation_config": GenerationConfig(**asked)}
        return runtime.generate(ids, **options)

    with pytest.raises(
        InputError, match=f"40 prompt tokens and the new ones are up to {context + 1}, but the backbone's"
    ):
        ask(context + 1)
    assert not runtime.windows and ask(45).shape[1] <= 45


@one_family
def test_no_criteria_are_no_criteria(model, indexer):
    runtime = LSARuntime(indexer, model, selection=TENTH)
    assert runtime.generate(prompt(40), stopping_criteria=None, **FEW).shape == (1, 44)


@two_families
def test_a_machine_that_cannot_pin_memory_says_so_or_serves_from_pageable(model, indexer, cannot_pin):
    ids = prompt(60, 2)
    runtime = LSARuntime(indexer, model, selection=TENTH, pageable=False)
    with pytest.raises(InputError, match=r"pinned host memory .*\(CUDA error: out of memory\): ask for pageable"):
        runtime.generate(ids, **FEW)
    runtime = LSARuntime(indexer, model, selection=EVERYTHING, pageable=True)
    assert torch.equal(runtime.generate(ids, **FEW), generate(model, ids, **FEW))
    assert not any(pool.pinned for pool in runtime.host.cache.cold.pools)


def test_what_does_not_work_is_refused(model, indexer):
    with pytest.raises(InputError, match="nothing was read yet"):
        LSARuntime(indexer, model).cycle.refresh()
    with pytest.raises(InputError, match="backend: cuda is not one of auto, torch, triton"):
        LSARuntime(indexer, model, backend="cuda")
    with pytest.raises(InputError, match="cap"):
        LSARuntime(indexer, model, Limits(cap=2))
    with pytest.raises(InputError, match="calibrate a threshold"):
        LSARuntime(indexer, model, selection=TENTH, fallback=Fallback())
    other = MemoryIndexer.from_spec(indexer.spec.model_copy(update={"backbone": "another"}))
    with pytest.raises(InputError, match="fingerprint another"):
        LSARuntime(other, model)


@pytest.mark.parametrize("given", [{"limits": 9}, {"selection": 0.1}, {"fallback": True}, {"correction": 3}], ids=str)
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_settings_of_another_type_are_refused_when_it_is_opened(model, indexer, given):
    ((name, value),) = given.items()
    with pytest.raises(
        InputError,
        match=rf"^{name}: {value} is not a (Limits|Budget or a Threshold or a Coverage|Fallback|Correction);",
    ):
        LSARuntime(indexer, model, **given)


dense_families = pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)


@dense_families
@pytest.mark.parametrize("query", ["same", "previous"])
def test_a_correction_beside_a_set_of_as_many_fewer(model, indexer, query, tmp_path):
    """Written by the runtime as by the session that evaluates it; all resident is the model's own generate."""
    ids, correction = prompt(150), Correction(chunks=3, query=query)
    expected = generate(model, ids, **GREEDY)
    runtime = LSARuntime(indexer, model, selection=EVERYTHING, correction=correction)
    assert torch.equal(runtime.generate(ids, **GREEDY), expected)
    runtime = LSARuntime(indexer, model, selection=TENTH, correction=correction)
    plain = LSARuntime(indexer, model, selection=TENTH)
    ours, _ = (each.generate(ids, **GREEDY)[0, 150:].tolist() for each in (runtime, plain))
    fewer = [one.resident - other.resident for one, other in zip(plain.windows, runtime.windows, strict=True)]
    assert fewer == [3] * 4 and runtime.host.resident_bytes().tensors == plain.host.resident_bytes().tensors
    session = DenseSession(model, indexer.spec.chunking)
    session.read(ids[0, :-1].tolist())
    given = Circumstances(indexer, Foresight(8), 0.1, correction)
    keep = next(policy for policy in ONLINE_POLICIES if policy.corrects).keep(given)
    course = Course(session, keep, [int(ids[0, -1])], 30)
    go_on([course], 8)
    assert ours == course.answer and session.host.cache.corrector.fetched > 0
    runtime.save_trace(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())["correction"]
    fetched = session.host.cache.corrector.fetched * runtime.host.cold_bytes // len(runtime.host.info.full_layers)
    assert written == {
        "chunks": 3, "query": query, "fetched_bytes": fetched,
        "mean_key_bytes": (173 // 4) * len(runtime.host.info.full_layers) * 2 * 16 * 2,
    }  # fmt: skip
    again = runtime.generate(ids[:, :140], **FEW)  # another conversation starts anew
    fresh = LSARuntime(indexer, model, selection=TENTH, correction=correction)
    assert torch.equal(again, fresh.generate(ids[:, :140], **FEW))


@two_families
def test_a_correction_that_cannot_be_is_refused(model, indexer):
    if model.config.model_type == "deepseek_v4":
        with pytest.raises(InputError, match="correction: this model caches no keys"):
            LSARuntime(indexer, model, correction=Correction(chunks=2))
        return
    runtime = LSARuntime(indexer, model, selection=TENTH, correction=Correction(chunks=4))
    with pytest.raises(InputError, match="correction: 4 chunks, but of 37 only 6 would be resident"):
        runtime.generate(prompt(150), **FEW)
    runtime = LSARuntime(indexer, model, selection=TENTH, correction=Correction(chunks=2))
    with pytest.raises(InputError, match="3 sequences at once"):
        runtime.generate(prompt(150, 3), **FEW)
