"""Every architecture that docs/models.md says to work does: traced and decoded against the stock model (see there)."""

import re
import sys
import warnings

import pytest
import transformers

from benchmarks import models
from benchmarks.models import Outcome, outcome, table
from benchmarks.tiny_models import classes, families, tiny
from data_gen.backbones.load import adapter
from tests.conftest import needs_pinned

PAGE = "docs/models.md"
FAMILIES = set(families())
ROW = re.compile(r"\| (\S+) \| (\S+) \| ([^|]+) \| ([^|]+) \|")


def rows(text):
    found = [row.groups() for row in map(ROW.fullmatch, text.splitlines()) if row and row[1] in FAMILIES]
    return [Outcome(*row) for row in found]


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        said = rows((metafunc.config.rootpath / PAGE).read_text())
        metafunc.parametrize("row", said, ids=[row.family for row in said])


def test_it_works_as_the_page_says(row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert outcome(row.family) == row


def test_the_page_names_all_there_are(request):
    needs_pinned("transformers")
    text = (request.config.rootpath / PAGE).read_text()
    assert f"Every architecture of {models.LIBRARY} that has a causal LM class, other than deepseek_v4" in text
    named = set(re.findall(r"^\| (\S+) \| ", text, re.M)) - {"architecture"}
    assert named == FAMILIES
    assert f"{len(rows(text))} of {len(named)} are traced" in text
    kinds = {row.kind.split(" in ")[0] for row in rows(text)}
    assert kinds >= {"ordinary", "MLA", "DSA"} and len(rows(text)) > 80


def test_classes_that_the_automatic_one_does_not_open_are_named(monkeypatch):
    monkeypatch.setattr(models, "classes", lambda: classes() | {"other": "OtherForCausalLM"})
    (named,) = re.findall(r"which it does not\nopen \((.*)\)\.", table([]))
    assert {"mistral4", "other"} <= set(named.split(", ")) and "llama" not in named
    for hidden in re.findall(r"Kosmos\w+ForCausalLM", table([])):
        assert not hasattr(transformers, hidden) and hidden not in classes().values()
    for family in re.search(r"(\w+), (\w+) and (\w+), which have MLA, are models", table([])).groups():
        config = transformers.AutoConfig.for_model(family)
        assert family not in classes() and config.get_text_config(decoder=True).kv_lora_rank


def test_the_page_is_the_table_of_its_own_rows(request):
    needs_pinned("transformers")
    text = (request.config.rootpath / PAGE).read_text()
    works, refused, unbuilt = (re.findall(r"^\| (\S+) \| (.+) \|$", part, re.M)[1:] for part in text.split("\n## "))
    made = [Outcome(family, *rest.split(" | ")) for family, rest in works]
    made += [Outcome(family, "", refused=reason) for family, reason in refused]
    made += [Outcome(family, "", unbuilt=reason) for family, reason in unbuilt]
    assert table(made) == text


REFUSED = [
    "minimax", "minimax_m3_vl_text", "gemma3n_text", "zaya", "gpt2", "git", "modernbert-decoder", "musicgen", "mllama",
    "mpt", "mamba2", "moshi", "qwen4_exp_text", "recurrent_gemma", "xglm", "xlstm",
]  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_a_refused_model_is_refused_as_the_page_says(family, request):
    (said,) = (line for line in table([outcome(family, (0,))]).splitlines() if line.startswith(f"| {family} | "))
    assert said in (request.config.rootpath / PAGE).read_text().split("## Refused")[1].splitlines()


def shifted(weights):
    return {layer: found.roll(1, dims=-1) for layer, found in weights.items()}


@pytest.mark.parametrize(
    "truth",
    [
        lambda stock, _, tokens: stock(tiny("llama", 7), tokens),
        lambda stock, model, tokens: shifted(stock(model, tokens)),
    ],
    ids=["another-model", "one-token-later"],
)
def test_wrong_probabilities_are_no_success(monkeypatch, truth):
    stock = models.eager_weights
    monkeypatch.setattr(models, "eager_weights", lambda *given: truth(stock, *given))
    with pytest.raises(AssertionError, match="traced probabilities differ"):
        outcome("llama", (0,))


def test_a_host_that_keeps_other_chunks_is_no_success(monkeypatch):
    stock = models.sees
    monkeypatch.setattr(models, "sees", lambda kept, *rest: stock(kept[:-1], *rest))
    with pytest.raises(AssertionError, match="logits differ"):
        outcome("llama", (0,))


def test_weights_that_do_not_make_the_output_are_no_truth(monkeypatch):
    """An attention whose output is scaled, and that says of no sinks."""
    module = sys.modules[type(tiny("llama")).__module__]
    stock = module.eager_attention_forward

    def scaled(*args, **kwargs):
        output, weights = stock(*args, **kwargs)
        return output * 1.01, weights

    monkeypatch.setattr(module, "eager_attention_forward", scaled)
    with pytest.raises(AssertionError, match=r"layer 0: its output is off its eager weights' sum by 1\.0e-02"):
        models.eager_weights(tiny("llama"), models.ids(0, 20))


def test_refusals_come_from_the_probe():
    found = outcome("opt", (0,))
    assert not found.kind and "positions are added to its token embeddings" in found.refused
    assert "| opt | " in table([found]) and adapter(tiny("llama")).info.full_layers == [0, 1, 2, 3]
