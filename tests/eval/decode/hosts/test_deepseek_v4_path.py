"""The whole path on a DeepSeek-V4 folder: documents, traces, an indexer, a bundle, decoding, the benchmark."""

import json
import signal
import sys

import pytest
import yaml

import cli
from tests.conftest import tiny_model


@pytest.fixture
def lookahead(capsys, monkeypatch):
    """Run the command in this process; returns what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lookahead", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed, errors = capsys.readouterr()
        assert not stop.value.code, errors
        return printed

    return call


def test_run_and_benchmark(tmp_path, tokenizer, tiny_recipe, lookahead):
    tiny_model("deepseek_v4").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = tiny_recipe.model_dump(mode="json")
    settings["backbone"]["path"] = str(tmp_path / "model")
    settings["documents"] |= {"train": {"text": 4}, "heldout": {"text": 1, "single": 1}}
    settings["train"]["epochs"] = 1
    settings["decode"]["text_tokens"] = 20
    settings["benchmark"] = {"policies": ["mean_pooled", "native", "oracle"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    printed = lookahead("run", tmp_path / "tiny.yaml", "--out", out)
    assert printed.splitlines()[-1].startswith("With ")
    rows = {row["policy"]: row for row in json.loads((out / "results.json").read_text())["decode"]}
    assert list(rows) == ["full", "indexer", "native", "recency", "random"]
    full, sparse = rows.pop("full"), list(rows.values())
    assert full["kv_share"] == full["agreement"] == 1 and full["kl"] == 0
    # Eleven or so of some hundred chunks, the sink and two or three new ones on top.
    assert all(0.1 < row["kv_share"] < 0.2 and row["kv_mb"] < 0.2 * full["kv_mb"] for row in sparse)
    assert all(row["kl"] > 0 and row["refreshes"] == 2 for row in sparse)
    length = ("--length", 450, "--examples", 1, "--task", "single", "--budget", 0.1)
    printed = lookahead("benchmark", out / "bundle", "--out", out, "--recipe", tmp_path / "tiny.yaml", *length)
    rows = json.loads((out / "results.json").read_text())["benchmark"]
    assert {row["policy"] for row in rows} == {"full", "native", "oracle"}
    assert "not run: mean_pooled" in printed
