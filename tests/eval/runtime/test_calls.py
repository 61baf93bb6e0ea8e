"""What a call of `generate` may ask for, and when one may go on from the last."""

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from data_gen.core.errors import InputError
from eval.runtime.calls import check_call, model_state
from eval.runtime.runtime import LSARuntime
from indexer_train.selection import Budget
from tests.conftest import tiny_model
from tests.eval.runtime.indexers import untrained

FEW = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


@pytest.fixture
def model():
    return tiny_model("llama")


def make_runtime(model, **options):
    return LSARuntime(untrained(model), model, selection=Budget(budget=0.2), **options)


def prompt(length=60, rows=1, seed=1):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def check(model, ids, mask=None, **options):
    return check_call(model, 512, ids, mask, options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"position_ids": torch.arange(1, 61)[None]}, "position_ids: .* leave position_ids out"),
        ({"position_ids": torch.arange(59)[None]}, "position_ids"),
        ({"token_type_ids": torch.ones(1, 60)}, "token_type_ids"),
        ({"negative_prompt_ids": torch.ones(1, 3)}, "negative_prompt_ids"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"cache_position": torch.arange(60)}, "cache_position"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
        ({"generation_config": GenerationConfig(encoder_repetition_penalty=1.5)}, "encoder_repetition_penalty"),
    ],
)
def test_what_is_not_listed_is_refused_by_name(model, options, what):
    runtime = make_runtime(model)
    with pytest.raises(InputError, match=what):
        runtime.generate(prompt(), **FEW, **options)
    assert not runtime.windows


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        (prompt().tolist(), "not an integer tensor"),
        (None, "not an integer tensor"),
        (prompt().float(), "not an integer tensor"),
        (prompt() > 3, "not an integer tensor"),
        (prompt()[0], r"\[60\] is not \[sequences, tokens\]"),
        (prompt() - 100, r"token -\d+ is not in the model's vocabulary of 128"),
        (prompt() + 100, r"token \d+ is not in the model's vocabulary of 128"),
    ],
)
def test_ids_that_are_no_tokens_of_the_model_are_refused(model, ids, what):
    runtime = make_runtime(model)
    with pytest.raises(InputError, match=f"input_ids: {what}"):
        runtime.generate(ids, **FEW)
    assert torch.equal(runtime.generate(prompt().int(), **FEW), runtime.generate(prompt(), **FEW))


def test_no_cache_is_the_runtimes_own(model):
    runtime = make_runtime(model)
    assert torch.equal(runtime.generate(prompt(), **FEW, past_key_values=None), runtime.generate(prompt(), **FEW))


def test_what_is_listed_is_the_models_own(model):
    """Nothing is evicted: options do what they do in the model's own generate."""
    ids = prompt()
    runtime = make_runtime(model)
    runtime.level1.selection = Budget(budget=1.0)
    for options in (
        {"position_ids": torch.arange(60)[None]},
        {"cache_implementation": "dynamic"},
        {"generation_config": GenerationConfig(cache_implementation="dynamic", **FEW)},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9, 4]]},
        {"min_new_tokens": 3, "suppress_tokens": [4, 5], "forced_eos_token_id": 7, "num_beams": 1, "use_cache": True},
    ):
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **FEW, **options)
        assert torch.equal(runtime.generate(ids, **FEW, **options), expected), options
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **FEW)
    model.generation_config.cache_implementation = "dynamic"
    assert torch.equal(runtime.generate(ids, **FEW), plain)


def test_settings_of_a_checkpoint_that_ask_for_nothing_are_let_through(model):
    config = model.generation_config
    config.early_stopping, config.num_assistant_tokens, config.a_word_of_the_author = True, 5, "x"
    assert check(model, prompt(), **FEW) == FEW
    config.num_beams = 3
    with pytest.raises(InputError, match="num_beams"):
        check(model, prompt(), **FEW)


@pytest.mark.parametrize("ends", [99, None, [7, 99]])
def test_padding_without_a_mask_is_refused(model, ends):
    options = {"pad_token_id": 7, "eos_token_id": ends}
    ids = prompt(rows=2).masked_fill(prompt(rows=2) == 7, 8)
    check(model, ids, **options)
    check(model, ids.index_fill(1, torch.tensor([20]), 7), **options)  # in the middle it is text
    for row, place in ((0, slice(0, 3)), (1, slice(-2, None))):
        padded = ids.clone()
        padded[row, place] = 7
        with pytest.raises(InputError, match=r"begins or ends with the pad token \(7\) and there is no attention_mask"):
            check(model, padded, **options)
        check(model, padded, torch.ones_like(padded), **options)  # said to be text
    both = ids.clone()
    both[:, -1] = 7
    if ends == [7, 99]:
        check(model, both, **options)  # both sequences end with the end-of-text token
    else:
        with pytest.raises(InputError, match="pad token"):
            check(model, both, **options)


def test_a_float16_load_is_called_by_its_name(model):
    runtime = make_runtime(model)
    with pytest.raises(InputError, match=r"this model has \w+; it is loaded in float16.* load it with dtype=torch"):
        LSARuntime(runtime.indexer, model.half())
    with pytest.raises(InputError, match=r"this model has \w+$"):
        LSARuntime(runtime.indexer, tiny_model("qwen3"))


class Adapted(nn.Module):
    """A linear layer with adapters, as adapter libraries put them there: all are loaded, one is active."""

    def __init__(self, base):
        super().__init__()
        self.base, self.active_adapter, self.scaling = base, "none", {"a": 1.0, "b": 1.0}
        self.deltas = nn.ParameterDict({name: 0.3 * torch.randn_like(base.weight) for name in "ab"})

    def forward(self, x):
        out = self.base(x)
        if self.active_adapter != "none":
            out = out + self.scaling[self.active_adapter] * x @ self.deltas[self.active_adapter].T
        return out


def edit_one_value(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1


def edit_one_value_through_data(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1


def swap_two_rows(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data[[0, 31]] = weight.data[[31, 0]]


def replace_a_tensor(model):
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight * 1.01)


def add_an_adapter(model):
    layer = model.model.layers[0].mlp
    layer.up_proj = Adapted(layer.up_proj)
    layer.up_proj.active_adapter = "a"


def switch_the_adapter(model):
    model.model.layers[1].mlp.gate_proj.active_adapter = "b"


def scale_the_adapter(model):
    model.model.layers[1].mlp.gate_proj.scaling["a"] = 0.5


CHANGES = [
    edit_one_value, edit_one_value_through_data, swap_two_rows, replace_a_tensor, add_an_adapter, switch_the_adapter,
    scale_the_adapter,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_turn_after_the_model_changed_reads_everything_anew(model, change, monkeypatch, caplog):
    layer = model.model.layers[1].mlp
    torch.manual_seed(0)
    layer.gate_proj = Adapted(layer.gate_proj)
    layer.gate_proj.active_adapter = "a"
    runtime, fresh = make_runtime(model), make_runtime(model)
    first = runtime.generate(prompt(), **FEW)
    second = torch.cat([first, prompt(9, seed=2)], dim=1)
    change(model)
    read, plain = [], runtime.host.read
    monkeypatch.setattr(runtime.host, "read", lambda ids: read.append(ids.shape[1]) or plain(ids))
    found = runtime.generate(second, **FEW)
    assert read == [second.shape[1] - 1] and "everything is read again" in caplog.text
    assert torch.equal(found, fresh.generate(second, **FEW)) and torch.equal(runtime.host.keys(), fresh.host.keys())
    third = torch.cat([found, prompt(9, seed=4)], dim=1)
    runtime.generate(third, **FEW)
    assert read[1:] == [9]  # and from there it goes on


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v4"])
def test_the_state_is_the_same_until_something_changes(family):
    model = tiny_model(family)
    state = model_state(model)
    with torch.no_grad():
        model(prompt())
    model.generate(prompt(), **FEW)
    assert model_state(model) == state
    for parameter in model.parameters():  # the last value of each, in words and behind them
        with torch.no_grad():
            held = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] += 1
            assert model_state(model) != state
            parameter.view(-1)[-1] = held
        assert model_state(model) == state
    assert model_state(model.to(torch.bfloat16)) != state


@pytest.mark.parametrize("apart", [1, 2, 8, 64, 127, 128, 512])
def test_two_values_that_change_places_are_another_state(apart):
    model = tiny_model("llama")
    state, weight = model_state(model), model.get_input_embeddings().weight.data.view(-1)
    for first in (0, 5, 640, 2000):
        pair = torch.tensor([first, first + apart])
        weight[pair] = weight[pair.flip(0)]
        assert model_state(model) != state
        weight[pair] = weight[pair.flip(0)]
    rows = weight.view(-1, 128)
    rows[[3, 7]] = rows[[7, 3]]
    assert model_state(model) != state


def test_a_buffer_that_no_checkpoint_holds_is_part_of_the_state():
    model = tiny_model("llama")
    state = model_state(model)
    model.get_decoder().rotary_emb.inv_freq[1] *= 1.01
    assert model_state(model) != state
