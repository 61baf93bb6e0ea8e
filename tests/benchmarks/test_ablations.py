"""The ablation at small size: development and report share nothing, shares side by side add up, tables are whole."""

import json
import sys

import pytest

from benchmarks import ablations
from data_gen.backbones.load import adapter, load_backbone
from data_gen.generate import generate
from data_gen.text.needles import KEYS
from recipes import load_recipe


@pytest.fixture(scope="module")
def recipe():
    settings = load_recipe("debug").model_dump()
    settings["documents"] |= {"train": {"text": 3, "single": 3}, "heldout": {"text": 1, "single": 1}}
    settings["train"] |= {"epochs": 1, "eval_epochs": 1, "validation_every": 3}
    settings["decode"]["answer_tokens"] = 3
    return type(load_recipe("debug")).model_validate(settings)


def test_development_and_report_share_no_text_no_wording_and_no_key(recipe):
    _, tokenizer = load_backbone(recipe.backbone)
    told = {
        name: ["".join(tokenizer.decode(document.tokens)) for _, document in found]
        for name in ablations.SETS
        for found in [ablations.documents(recipe, name, "stdlib", tokenizer, 1 << 15)]
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
    generate(
        adapter(model), tokenizer, recipe.documents, recipe.trace, "train", tmp_path / "traces", lambda items, _: items
    )
    monkeypatch.setattr(ablations, "load_recipe", lambda _: recipe)

    def call(*arguments: str, out: str = "out") -> str:
        monkeypatch.setattr(sys, "argv", ["ablations", "debug", *arguments, "--out", str(tmp_path / out)])
        ablations.main()
        return capsys.readouterr().out

    traces = str(tmp_path / "traces")
    names = [ablations.RECIPE, "listwise_peak", "focal"]
    assert "variation" not in call(traces, *(word for name in names for word in ("--train", name)))
    for share in ("0/2", "1/2"):
        assert "variation" not in call(traces, "--share", share, "--follow", "16")
    table = call()
    found = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert {row["set"] for row in found["rows"]} == set(ablations.SETS)
    by_name = {row["policy"]: row for row in found["rows"] if row["set"] == "report"}
    assert by_name.keys() >= {*names, "full", "recency", "oracle of peaks"} and all(name in table for name in by_name)
    assert by_name["full"]["kl"] == 0 < by_name["oracle of peaks"]["kl"] < by_name["recency"]["kl"]
    assert by_name["full"]["kept"] == 1 > by_name["recipe"]["kept"]
    assert by_name["recipe"]["kl_difference"] == [0, 0, 0] and by_name["recipe"]["kl_documents"] == 2
    assert len(found["rank_correlations"]) == 6 and "fetched" not in table

    (tmp_path / "corrected").mkdir()
    (tmp_path / "out" / names[0]).rename(tmp_path / "corrected" / names[0])
    table = call(traces, "--correction", "2", "--follow", "16", out="corrected")
    found = json.loads((tmp_path / "corrected" / "ablations.json").read_text())["rows"]
    by_name = {row["policy"]: row for row in found if row["set"] == "report"}
    for name in ("recipe + 2 by same", "recipe + 2 by previous"):
        assert by_name[name]["kept"] == pytest.approx(by_name["recipe"]["kept"]) and name in table
        assert by_name[name]["fetched"] > by_name["recipe"]["fetched"] and by_name[name]["kl_difference"][0] != 0
        assert by_name[name]["mean_key_bytes"] > by_name["recipe"]["mean_key_bytes"] == 0
