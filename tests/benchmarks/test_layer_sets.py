"""A set for each group of layers: what its layers see, what its labels pool, and the whole command at small size."""

import json
import sys
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from benchmarks import layer_sets
from benchmarks.masked import MaskedModel, Policy
from benchmarks.masked_scores import foresight, recency
from data_gen.backbones.layers import attention_modules
from data_gen.backbones.load import adapter, load_backbone
from data_gen.backbones.tiny import tiny_backbone
from data_gen.core.chunks import Chunking
from data_gen.generate import generate
from recipes import load_recipe

CHUNKING, BUDGET, PROMPT, NEW = Chunking(tokens=4, sink=1, recent=4), 0.2, 131, 8


def oldest(going, row):
    return -recency(going, row)


def middle(going, row):
    order = recency(going, row)
    return -(order - order.mean()).abs()


@pytest.fixture(scope="module")
def recipe():
    settings = load_recipe("debug").model_dump()
    settings["documents"] |= {"train": {"text": 3, "single": 3}, "heldout": {"text": 3, "single": 3}}
    settings["train"] |= {"epochs": 1, "eval_epochs": 1, "validation_every": 3}
    settings["decode"]["answer_tokens"] = 3
    settings["trace"]["chunking"]["recent"] = 16  # an answer's beginning stays among them
    return type(load_recipe("debug")).model_validate(settings)


@pytest.fixture(scope="module")
def store(recipe, tmp_path_factory):
    model, tokenizer = load_backbone(recipe.backbone)
    out = tmp_path_factory.mktemp("traces")
    return generate(adapter(model), tokenizer, recipe.documents, recipe.trace, out, ["train"])[0]


@pytest.fixture(scope="module")
def read():
    """(masked model, its prompt, all tokens)."""
    model, _ = tiny_backbone()
    masked = MaskedModel(model.cpu(), CHUNKING)
    tokens = torch.randint(5, 100, (PROMPT + NEW,), generator=torch.Generator().manual_seed(0))
    return masked, masked.prompt(tokens[:PROMPT].tolist()), tokens


def continued(read, policies):
    masked, prompt, tokens = read
    going = masked.begin(prompt, policies)
    masked.refresh(going, NEW)
    return masked.read(going, tokens[PROMPT:].expand(len(policies), -1)), going


def test_each_layer_attends_to_the_set_of_its_group(read):
    masked, _, tokens = read
    groups = [[0], [1, 2]]
    score = layer_sets.by_layer([oldest, middle], groups)
    (found, shared, *_), going = continued(read, [Policy("groups", score, BUDGET), Policy("one", oldest, BUDGET)])
    chunks = PROMPT // CHUNKING.tokens
    first, last = CHUNKING.sink, PROMPT // CHUNKING.tokens - CHUNKING.recent
    count = CHUNKING.kept(BUDGET, PROMPT - 1)
    places = torch.arange(first, last)
    order = {0: places[:count], 1: places[((places - (chunks - 1) / 2).abs()).argsort(stable=True)[:count]]}
    stock = DynamicCache(config=masked.model.config)
    with torch.no_grad():
        masked.model(tokens[None, :PROMPT], past_key_values=stock)
    with ExitStack() as stack, torch.no_grad():
        for layer, module in attention_modules(masked.model).items():
            resident = torch.ones(chunks, dtype=torch.bool)
            resident[first:last] = False
            resident[order[min(layer, 1)]] = True
            visible = torch.ones(PROMPT + NEW, PROMPT + NEW, dtype=torch.bool).tril()[PROMPT:]
            visible[:, : chunks * CHUNKING.tokens] &= resident.repeat_interleave(CHUNKING.tokens)
            bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
            hook = partial(lambda _, args, kwargs, bias: (args, kwargs | {"attention_mask": bias}), bias=bias)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        expected = masked.model(tokens[None, PROMPT:], past_key_values=stock).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(found, shared, atol=1e-2)
    resident = going.resident[0]
    assert torch.equal(resident[1], resident[2]) and not torch.equal(resident[0], resident[1])
    assert torch.equal(resident[0], going.resident[1, 0]) and len({int(layer.sum()) for layer in resident}) == 1
    torch.testing.assert_close(going.kept[0][0], going.kept[0][1])


def test_one_group_is_the_shared_set(read):
    masked = read[0]
    one = layer_sets.by_layer([middle], layer_sets.cut(masked.layers, 1))
    logits, going = continued(read, [Policy("one group", one, BUDGET), Policy("shared", middle, BUDGET)])
    assert torch.equal(logits[0], logits[1]) and torch.equal(going.resident[0], going.resident[1])


def test_an_oracle_of_groups_averages_their_own_layers(read):
    masked, prompt, tokens = read
    full = masked.begin(prompt, [Policy("full", None, 1.0)], watch=True)
    masked.refresh(full, NEW)
    masked.read(full, tokens[None, PROMPT:])
    asked = masked.begin(prompt, [Policy("any", recency, BUDGET)])
    whole, *alone = (foresight(full, NEW, False, layers)(asked, 0) for layers in (None, [0], [1], [2]))
    torch.testing.assert_close(torch.stack(alone).mean(dim=0), whole)
    scores = layer_sets.oracle_of([[0, 1], [2]])(full, NEW)(asked, 0)
    peaks = {layer: torch.cat([highest for highest, _ in full.watched[layer]]) for layer in masked.layers}
    torch.testing.assert_close(scores[0], ((peaks[0] + peaks[1]) / 2).amax(dim=0))
    torch.testing.assert_close(scores[2], peaks[2].amax(dim=0))
    assert torch.equal(scores[0], scores[1]) and not torch.allclose(scores[1], scores[2])


def test_layers_are_cut_evenly():
    layers = list(range(30))
    assert layer_sets.cut(layers, 3) == [layers[:10], layers[10:20], layers[20:]]
    assert [len(group) for group in layer_sets.cut(layers, 7)] == [4, 4, 4, 5, 4, 4, 5]
    assert [layer for group in layer_sets.cut(layers, 7) for layer in group] == layers


def test_a_groups_labels_are_its_own_layers(store):
    whole, same = next(iter(store)), next(iter(layer_sets.GroupStore.of(store, [0, 1, 2])))
    part = next(iter(layer_sets.GroupStore.of(store, [0, 2]).hold_back(3)[0]))
    windows = part.windows(serving=True)
    assert torch.equal(whole.labels(windows).peak, same.labels(windows).peak)
    stored, (first, last) = whole.attention, windows[0].tolist()
    expected = torch.zeros(whole.chunks)
    for token in range(first, last):
        for place in range(int(stored.pointers[token]), int(stored.pointers[token + 1])):
            chunk, peak = int(stored.chunks[place]), stored.peak[place].float()
            expected[chunk] = max(expected[chunk], (peak[0] + peak[2]) / 2)
    labels = part.labels(windows)
    torch.testing.assert_close(labels.peak[0], expected * labels.candidate[0])
    assert not torch.allclose(labels.peak, whole.labels(windows).peak)


def test_groups_are_trained_asked_and_printed(recipe, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer_sets, "load_recipe", lambda _: recipe)
    result = tmp_path / "result.json"
    sizes = ["--texts", "1", "--questions", "1", "--follow", "16", "--output", str(result)]
    call = ["layer_sets", "debug", str(store.root), "--out", str(tmp_path / "out"), "--groups", "2", *sizes]
    for journals, share in enumerate(("0/0", "0/2", "1/2")):
        monkeypatch.setattr(sys, "argv", [*call, "--share", share])
        layer_sets.main()
        assert not result.exists() and len(list((tmp_path / "out").glob("asked-*"))) == journals
    monkeypatch.setattr(sys, "argv", call)
    layer_sets.main()
    found = json.loads(result.read_text())
    assert not (tmp_path / "out" / "asked-0-of-1.jsonl").exists(), "nothing was left to ask"
    monkeypatch.setattr(sys, "argv", [*call, "--share", "0/0"])
    layer_sets.main()
    assert json.loads(result.read_text())["rows"] == found["rows"]
    assert found["trained_on"] == {"text": 3, "single": 3} and found["groups"]["2 groups"] == [[0], [1, 2]]
    cells = {(row["set"], row["kind"]): {} for row in found["rows"]}
    for row in found["rows"]:
        cells[row["set"], row["kind"]][row["policy"]] = row
    assert set(cells) == {(part, kind) for part in ("development", "report") for kind in ("text", "questions")}
    texts, table = cells["report", "text"], capsys.readouterr().out
    names = {"full", "recency", "shared", "2 groups", "oracle, shared", "oracle, 2 groups", "oracle, a set a layer"}
    assert texts.keys() == names and all(name in table for name in names)
    assert texts["full"]["kl"] == 0 < texts["oracle, a set a layer"]["kl"] != texts["oracle, shared"]["kl"]
    assert texts["2 groups"]["kept"] == pytest.approx(texts["shared"]["kept"])
    gap = texts["2 groups"]["kl"] - texts["shared"]["kl"]
    assert texts["2 groups"]["kl_beside_shared"][0] == pytest.approx(gap) and gap != 0
    assert texts["2 groups"]["fall"] == pytest.approx(-gap / texts["shared"]["kl"])
    against = texts["oracle, 2 groups"]["kl"] - texts["oracle, shared"]["kl"]
    assert texts["oracle, 2 groups"]["kl_beside_shared"][0] == pytest.approx(against)
    assert texts["shared"]["documents"] == 2
    bare = [part for part in call if part != str(store.root)]
    others = ["--set", "report", "--out", str(tmp_path / "oracles"), "--groups", "2", "3"]
    monkeypatch.setattr(sys, "argv", [*bare, *others])
    layer_sets.main()  # without traces: the oracles alone, and those of the calls before
    alone = {row["policy"]: row for row in json.loads(result.read_text())["rows"] if row["kind"] == "text"}
    assert alone.keys() == {"full", "recency", *(name for name in names if "oracle" in name), "oracle, 3 groups"}
    assert alone["oracle, 2 groups"]["kl"] == pytest.approx(texts["oracle, 2 groups"]["kl"])
    assert alone["oracle, 3 groups"]["kl"] == alone["oracle, a set a layer"]["kl"]
    monkeypatch.setattr(sys, "argv", [*call, "--set", "report"])
    layer_sets.main()
    assert json.loads(result.read_text())["rows"] == [row for row in found["rows"] if row["set"] == "report"]
