"""The ablation at small size: development and report share nothing, shares side by side add up, tables are whole."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import ablations, variations
from benchmarks.ablation_tables import DIAGNOSES, EVERY, correlations, ranked, rows
from benchmarks.masked import MaskedModel, Policy
from benchmarks.masked_scores import recency
from data_gen.backbones.load import adapter, load_backbone
from data_gen.core.errors import InputError
from data_gen.generate import generate
from data_gen.text.needles import KEYS
from data_gen.traces.store import TraceStore
from eval.online.scorers import fidelity
from indexer_train.load import load_indexer
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train
from recipes import load_recipe

SOURCES = {"development": ["stdlib"], "report": None}


@pytest.fixture(scope="module")
def recipe():
    settings = load_recipe("debug").model_dump()
    settings["documents"] |= {"train": {"text": 3, "single": 3}, "heldout": {"text": 1, "single": 1}}
    settings["train"] |= {"epochs": 1, "eval_epochs": 1, "validation_every": 3}
    settings["decode"]["answer_tokens"] = 3
    settings["trace"]["window"] = 32
    settings["trace"]["chunking"]["recent"] = 16  # an answer's beginning stays among them
    settings["benchmark"] |= {"tasks": ["single", "text"], "examples": 2, "texts": 1, "budgets": [0.05, 0.2]}
    return type(load_recipe("debug")).model_validate(settings)


def test_development_and_report_share_no_text_no_wording_and_no_key(recipe):
    _, tokenizer = load_backbone(recipe.backbone)
    told = {
        name: ["".join(tokenizer.decode(asked.prompt + asked.given)) for asked in found]
        for name in ablations.SETS
        for found in [ablations.held_out(recipe, name, SOURCES[name], 16, tokenizer, 1 << 15)]
    }
    questions = {name: [text.rsplit("\n\n", 1)[-1] for text in texts] for name, texts in told.items()}
    assert all(len(texts) == 4 for texts in told.values())
    pieces = {name: {text[at : at + 60] for text in texts for at in range(0, 600, 60)} for name, texts in told.items()}
    own = pieces["development"] & pieces["report"]
    assert all(piece.startswith("Read the text") or "answer the question" in piece for piece in own)
    for name, other in (("development", "heldout"), ("report", "train")):
        asked = [text for text in questions[name] if "?" in text and "answer" not in text.lower()]
        assert not any(f" {key}" in text for text in asked for key in KEYS[other] if len(key) > 5)


def test_variations_are_trained_asked_in_shares_and_printed(recipe, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_backbone(recipe.backbone)
    generate(adapter(model), tokenizer, recipe.documents, recipe.trace, tmp_path / "traces", ["train"])
    monkeypatch.setattr(ablations, "load_recipe", lambda _: recipe)

    def call(*arguments: str, out: str = "out") -> str:
        monkeypatch.setattr(sys, "argv", ["ablations", "debug", *arguments, "--out", str(tmp_path / out)])
        ablations.main()
        return capsys.readouterr().out

    traces = str(tmp_path / "traces" / "train")
    names = [ablations.RECIPE, "listwise_peak", "focal", "middle-layer", "horizon-16"]
    assert "variation" not in call(traces, *(word for name in names for word in ("--train", name)))
    for share in ("0/2", "1/2"):
        assert "variation" not in call(traces, "--share", share, "--follow", "16")
    table = call()
    found = json.loads((tmp_path / "out" / "ablations.json").read_text())
    rows = found["rows"]
    assert {row["set"] for row in rows} == set(ablations.SETS)
    texts, asked = ({row["policy"]: row for row in rows if row["set"] == "report" and row["task"] == task}
                    for task in ("text", "single"))  # fmt: skip
    named = {*names, "full", "recency", "mean-pooled keys", "oracle of peaks"}
    assert texts.keys() >= named and all(name in table for name in texts)
    assert texts["full"]["kl"] == 0 < texts["oracle of peaks"]["kl"] < texts["recency"]["kl"]
    assert texts["full"]["kept"] == 1 > texts["recipe"]["kept"]
    assert texts["recipe"]["kl_beside_recipe"] == [0, 0, 0] and texts["recipe"]["documents"] == 2
    gap = texts["focal"]["kl"] - texts["recency"]["kl"]
    assert texts["focal"]["kl_beside_recency"][0] == pytest.approx(gap) and "right_beside_recency" in asked["focal"]
    assert texts.keys() >= {"recipe, every 16"} and "peak_entropy" not in texts["horizon-16"]
    specs = {name: load_indexer(tmp_path / "out" / name / "indexer").spec for name in names}
    assert {name: (len(spec.layers), spec.window) for name, spec in specs.items()} == {
        "recipe": (3, 32), "listwise_peak": (3, 32), "focal": (3, 32), "middle-layer": (1, 32), "horizon-16": (3, 16),
    }  # fmt: skip
    assert len(found["rank_correlations"]) == 3 * len(DIAGNOSES) and "fetched" not in table

    at_length = ["--ask", names[0], "--set", "report", "--length", "600", "--length", "800", "--follow", "16"]
    table = call(traces, *at_length, "--correction", "2", "--report", "package:typer", out="at_length")
    rows = json.loads((tmp_path / "at_length" / "ablations.json").read_text())["rows"]
    assert {(row["tokens"], row["task"]) for row in rows} == {
        (n, task) for n in (600, 800) for task in ("single", "text")
    }
    assert {row["documents"] for row in rows if row["task"] == "single"} == {2}
    for length in (600, 800):
        texts = {row["policy"]: row for row in rows if row["tokens"] == length and row["task"] == "text"}
        asked = {row["policy"]: row for row in rows if row["tokens"] == length and row["task"] == "single"}
        assert asked["recipe"]["kept"] < texts["recipe"]["kept"], "questions under the smaller budget"
        for name in ("recipe + 2 by same", "recipe + 2 by previous"):
            assert texts[name]["kept"] == pytest.approx(texts["recipe"]["kept"]) and name in table
            assert texts[name]["fetched"] > texts["recipe"]["fetched"] and texts[name]["kl_beside_recipe"][0] != 0
            assert texts[name]["kept"] < min(
                texts[f"{each}, bytes of the correction"]["kept"] for each in ("recipe", "recency", "mean-pooled keys")
            )
            assert texts[name]["key_bytes"] > texts["recipe"]["key_bytes"] > texts["recency"]["key_bytes"] == 0
            other = "recency, bytes of the correction"
            gap = texts[name]["kl"] - texts[other]["kl"]
            assert texts[name][f"kl_beside_{other}"][0] == pytest.approx(gap)


def test_a_recipe_with_traces_of_its_own_is_asked_beside_the_variations(recipe, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_backbone(recipe.backbone)
    first = recipe.model_copy(update={"trace": recipe.trace.model_copy(update={"layers": recipe.trace.layers[:1]})})
    own = first.trace.model_copy(update={"own_tokens": 40, "window": 16})
    coarse = first.trace.model_copy(update={"chunking": recipe.trace.chunking.model_copy(update={"tokens": 8})})
    recipes = {
        name: recipe.model_copy(update={"trace": trace})
        for name, trace in {"debug": recipe.trace, "own.yaml": own, "coarse.yaml": coarse}.items()
    }
    for name, each in recipes.items():
        generate(adapter(model), tokenizer, each.documents, each.trace, tmp_path / name, ["train"])
    for module in (ablations, variations):
        monkeypatch.setattr(module, "load_recipe", lambda name: recipes[name])

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ablations", "debug", *arguments, "--out", str(tmp_path / "out")])
        ablations.main()
        return capsys.readouterr().out

    traces = str(tmp_path / "debug" / "train")
    variant = ["--variant", f"own-answers=own.yaml:{tmp_path / 'own.yaml' / 'train'}"]
    call(traces, *variant, "--train", "recipe", "--train", "own-answers", "--batches", "device")
    said = json.loads((tmp_path / "out" / "recipe" / "diagnosis.json").read_text())
    assert said.keys() == {*DIAGNOSES, "diagnosed_on"}
    with pytest.raises(InputError, match="holds training documents"):
        call(traces, "--diagnose", traces, "--train", "bce")
    spec = load_indexer(tmp_path / "out" / "own-answers" / "indexer").spec
    assert (spec.layers, spec.window, spec.provenance.train["batches"]) == (own.layers, 16, "device")
    assert json.loads((tmp_path / "out" / "own-answers" / "diagnosis.json").read_text()) == {}
    call(traces, *variant, "--share", "0/1", "--set", "report", "--length", "600", "--task", "text", "--task", "single",
         "--examples", "1", "--texts", "1", "--follow", "32", "--report", "package:typer")  # fmt: skip
    asked = [json.loads(line) for line in (tmp_path / "out" / "asked-0-of-1.jsonl").read_text().splitlines()]
    assert [each["task"] for each in asked] == ["text", "single"], "in the order asked for"
    assert all({"recipe", "own-answers", "recipe, every 16"} <= each["runs"].keys() for each in asked)
    assert asked[0]["runs"]["own-answers"]["kept"] == pytest.approx(asked[0]["runs"]["recipe"]["kept"], abs=0.02)
    assert "own-answers" in call()
    with pytest.raises(InputError, match="chunking"):
        call(traces, "--variant", f"coarse=coarse.yaml:{tmp_path / 'coarse.yaml' / 'train'}", "--train", "coarse")
    for wrong in ("own.yaml:traces", "focal=own.yaml:traces", "own=own.yaml", "../own=own.yaml:traces"):
        with pytest.raises(InputError, match="--variant"):
            call(traces, "--variant", wrong)


def test_epochs_of_one_training_are_kept_asked_and_ranked(recipe, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_backbone(recipe.backbone)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 3})})
    generate(adapter(model), tokenizer, recipe.documents, recipe.trace, tmp_path / "traces", ["train"])
    monkeypatch.setattr(ablations, "load_recipe", lambda _: recipe)
    out, traces = tmp_path / "out", tmp_path / "traces" / "train"

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ablations", "debug", str(traces), *arguments, "--out", str(out), "--epochs"])
        ablations.main()
        return capsys.readouterr().out

    call("--train", "recipe")
    once = train(
        TraceStore.open(traces), recipe.indexer, recipe.train.model_copy(update={"patience": 3}), tmp_path / "once"
    )
    kept = {name: load_indexer(out / name / "indexer") for name in ("recipe", "epoch-1", "epoch-2", "epoch-3")}
    said = {n: json.loads((out / f"epoch-{n}" / "diagnosis.json").read_text())["peak_entropy"] for n in (1, 2, 3)}
    best = kept[f"epoch-{min(said, key=said.__getitem__)}"].state_dict()
    for weights in (kept["recipe"].state_dict(), once.state_dict()):
        assert all(torch.equal(best[name], value) for name, value in weights.items())
    assert len({float(next(indexer.parameters()).detach().sum()) for indexer in kept.values()}) == 3, (
        "each epoch differs"
    )
    table = call("--set", "development", "--follow", "16")
    found = json.loads((out / "ablations.json").read_text())
    assert {row["policy"] for row in found["rows"]} >= kept.keys() and "epoch-3" in table
    assert {line["variations"] for line in found["rank_correlations"]} == {3}, "what was chosen is one of them"
    with pytest.raises(SystemExit):
        call("--train", "focal")
    assert "focal: none of what is compared" in capsys.readouterr().err
    (tmp_path / "variations" / "recipe").mkdir(parents=True)
    with pytest.raises(InputError, match="holds variations"):
        variations.learn_epochs(recipe, [traces], tmp_path / "variations", None, None)


def test_what_is_compared_as_it_is_read_is_what_was_kept(recipe):
    model, _ = load_backbone(recipe.backbone)
    masked = MaskedModel(model, recipe.trace.chunking)
    tokens = [7 * number % 50 for number in range(600)]
    prompt, rest = masked.prompt(tokens[:552]), tokens[552:]
    policies = [Policy("recency", recency, 0.1), Policy("often", recency, 0.2, every=16)]
    (full,) = ablations.followed(masked, masked.begin(prompt, [Policy("full", None, 1.0)]), rest, 32)
    kept = ablations.followed(masked, masked.begin(prompt, policies), rest, 32)
    pairs = ablations.followed(masked, masked.begin(prompt, policies), rest, 32, full)
    for log_p, found in zip(kept, pairs, strict=True):
        assert all(torch.equal(*each) for each in zip(fidelity(log_p, full), found, strict=True))
    assert float(pairs[0][1].mean()) > 0


def test_what_is_said_of_an_indexer_is_the_trainers_and_is_said_of_texts_and_questions_too(recipe, tmp_path):
    model, tokenizer = load_backbone(recipe.backbone)
    generate(adapter(model), tokenizer, recipe.documents, recipe.trace, tmp_path, ["train", "heldout"])
    store, config = TraceStore.open(tmp_path / "heldout"), recipe.train
    names = ["recipe", "golden-0.2"]
    variations.learn(recipe, [tmp_path / "train"], names, tmp_path / "out", measured=tmp_path / "heldout")
    with pytest.raises(InputError, match="not to be compared"):
        variations.learn(recipe, [tmp_path / "train"], names, tmp_path / "out")
    said, other = (json.loads((tmp_path / "out" / name / "diagnosis.json").read_text()) for name in names)
    indexer, second = (load_indexer(tmp_path / "out" / name / "indexer") for name in names)
    assert variations.diagnosed(second, store, config).items() <= other.items(), "by what the recipe calls golden"
    assert variations.diagnosed(second, store, config.model_copy(update={"golden": 0.2})).items() - other.items()
    whole = MassRecallEvaluator(store, config.budget)(indexer)
    assert {name: said[name] for name in ("peak_entropy", "mass_recall")} == pytest.approx(
        {name: whole[name] for name in ("peak_entropy", "mass_recall")}
    )
    texts = store.only([path for path in store.files if store.document(path).meta.task == "text"])
    assert 0 < len(texts.files) < len(store.files)
    assert variations.diagnosed(indexer, texts, config)["peak_entropy"] == said["peak_entropy_of_texts"]
    assert "golden_recall_of_questions" not in variations.diagnosed(indexer, texts, config)


def test_a_rank_correlation_shares_ranks_among_equals():
    said = [("a", 0.1, 0.5), ("b", 0.2, 0.5), ("c", 0.3, 0.1)]
    rows = [
        {"set": "report", "task": "text", "policy": name, "kl": kl, "right": 1.0, **dict.fromkeys(DIAGNOSES, value)}
        for name, value, kl in said
    ]
    lines = ablations.correlations(rows)
    assert [line["kl"] for line in lines] == pytest.approx([-(3**0.5) / 2] * len(DIAGNOSES))
    assert [line["right"] for line in lines] == [None] * len(DIAGNOSES), "all equally right: no rank"


def test_the_interval_of_a_rank_correlation_holds_the_truth_as_often_as_it_says():
    generator, truth, number = np.random.default_rng(0), 0.5, 17
    rank = 6 / np.pi * np.arcsin(truth / 2)  # Spearman's of two normals whose correlation is `truth`
    pairs = generator.multivariate_normal([0, 0], [[1, truth], [truth, 1]], size=(1000, number))
    places = pairs.argsort(axis=1).argsort(axis=1)
    intervals = [ranked(float(np.corrcoef(drawn.T)[0, 1]), number) for drawn in places]
    held = [low <= rank <= high for low, high in (map(float, each[7:-1].split(", ")) for each in intervals)]
    assert 0.93 <= np.mean(held) <= 0.98
    assert (ranked(None, 17), ranked(0.5, 3), ranked(-1.0, 12)) == ("-", "+0.50", "-1.00")


def test_questions_of_several_kinds_are_added_up_and_as_many_right_are_a_tie(tmp_path):
    said = {"recipe": 0.1, "one": 0.2, "two": 0.3}
    for name, value in said.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "diagnosis.json").write_text(json.dumps(dict.fromkeys(DIAGNOSES, value)))
    right = {"one": (3, 2, 7), "two": (7, 3, 2), "recipe": (2, 7, 3)}  # whose thirds add up to different floats
    records = []
    for at, task in enumerate(("single", "multi_key", "multi_value")):
        for number in range(10):
            runs = {name: {"right": number < hits[at], "kept": 0.1} for name, hits in right.items()}
            runs |= {name: {"right": True, "kept": 1.0} for name in ("full", "recency", "mean-pooled keys")}
            records.append({"set": "report", "tokens": 0, "task": task, "runs": runs})
    found = rows(records, tmp_path)
    pooled = {row["policy"]: row for row in found if row["task"] == EVERY}
    assert pooled["two"]["documents"] == 30 and pooled["two"]["right"] == pytest.approx(0.4)
    assert pooled["two"]["right_beside_recipe"][0] == pytest.approx(0) and pooled["two"]["solved_documents"] == 30
    ranks = [line["right"] for line in correlations(found)]
    assert ranks == [None] * len(DIAGNOSES), "as many right in another order"
