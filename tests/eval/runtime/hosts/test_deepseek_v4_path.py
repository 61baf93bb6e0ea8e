"""The whole path on the trained pocket model: chats, traces, an indexer, a bundle, decoding, the benchmark."""

import json
import signal
import sys

import pytest
import yaml

import cli
from recipes import load_recipe
from recipes.pocket.config import load_config
from recipes.pocket.documents import ASKED, write_chats, write_questions


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


@pytest.fixture
def recipe(pocket, tmp_path):
    """pocket-v4 on four short chats and four questions on one text; training starts from the native indexers."""
    language = load_config(pocket.folder.with_name("config.yaml"))
    write_chats(language, tmp_path / "chats.jsonl", 40, (512, 600))
    write_questions(language, tmp_path, "report", 512, 1)
    settings = load_recipe("pocket-v4").model_dump(mode="json")
    settings["documents"] |= {"source": str(tmp_path / "chats.jsonl"), "train": {"chat": 3}, "heldout": {"chat": 1}}
    settings["train"] |= {"epochs": 1, "validation_every": 3, "init": str(pocket.folder)}
    settings["benchmark"] |= {
        "policies": ["indexer", "mean_pooled", "native", "oracle"],
        "files": [{"format": "ruler", "source": str(tmp_path / "report" / f"{task}-512.jsonl")} for task in ASKED],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "small.yaml"


def test_run_and_benchmark(tmp_path, recipe, lookahead):
    out = tmp_path / "out"
    printed = lookahead("run", recipe, "--out", out)
    assert printed.splitlines()[-1].startswith("With ")
    rows = {row["policy"]: row for row in json.loads((out / "results.json").read_text())["decode"]}
    assert list(rows) == ["full", "indexer", "native", "recency", "random"]
    full, sparse = rows.pop("full"), list(rows.values())
    assert full["kv_share"] == full["agreement"] == 1 and full["kl"] == 0
    # An eighth of the chunks, the newest one on top, and what is made while the answer is written.
    assert all(0.12 < row["kv_share"] < 0.15 and row["kv_mb"] < 0.5 * full["kv_mb"] for row in sparse)
    assert all(row["kl"] > -1e-6 and row["refreshes"] == 1 for row in sparse)  # fp32: equal texts round to either side
    assert rows["indexer"]["kl"] < min(rows["recency"]["kl"], rows["random"]["kl"])
    printed = lookahead("benchmark", out / "bundle", "--out", out, "--recipe", recipe)
    rows = json.loads((out / "results.json").read_text())["benchmark"]
    assert {row["policy"] for row in rows} == {"full", "indexer", "native", "oracle"}
    assert "not run: mean_pooled" in printed
