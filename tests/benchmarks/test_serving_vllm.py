"""The pure parts of benchmarks/serving_vllm.py; its servers need an engine."""

import json

import pytest

from benchmarks import serving_vllm
from benchmarks.machine import origin
from benchmarks.serving_vllm import arrivals, cut, environment, figures, speed


def event(*token_ids):
    return b"data: " + json.dumps({"choices": [{"text": "x", "token_ids": ids} for ids in token_ids]}).encode() + b"\n"


def test_tokens_are_counted_and_not_events(monkeypatch):
    """An event of two tokens, one of text alone, and one of usage without a choice."""
    monkeypatch.setattr(serving_vllm.time, "perf_counter", iter([1.0, 2.0, 3.0, 4.0]).__next__)
    lines = [event([5]), b"\n", event([6, 7]), event(None), event(), b"data: [DONE]\n"]
    assert arrivals(lines) == [1.0, 2.0, 2.0]


def test_speed():
    """Five tokens in four seconds; gaps of 1, 1 and 3 s."""
    found = speed([[0.0, 1.0, 2.0], [1.0, 4.0]])
    assert found["tokens_per_second"] == 5 / 4
    assert found["gap_median_ms"] == 1000
    assert found["gap_p95_ms"] >= 3000


def test_figures_are_summed_over_labels():
    page = '# HELP a\na{engine="0"} 2.0\na{engine="1"} 3.0\nb 1e+03\n'
    assert figures(page) == {"a": 5.0, "b": 1000.0}


def test_a_command_can_be_repeated(monkeypatch):
    """An argument of several words stays one."""
    monkeypatch.setattr("sys.argv", ["benchmarks/serving_vllm.py", "model", "--engine", "--dtype float32"])
    assert origin()["command"] == "python -m benchmarks.serving_vllm model --engine '--dtype float32'"


def test_the_stock_server_hears_nothing_of_the_plugin(monkeypatch):
    monkeypatch.setenv("LOOKAHEAD_BUNDLE", "elsewhere")
    monkeypatch.setenv("LOOKAHEAD_BUDGET", "0.5")
    assert not [name for name in environment({}) if name.startswith("LOOKAHEAD_")]
    ours = environment({"BUNDLE": "here"})
    assert {name: ours[name] for name in ours if name.startswith("LOOKAHEAD_")} == {"LOOKAHEAD_BUNDLE": "here"}


def test_prompts_are_as_long_as_asked_for_or_refused():
    texts = [list(range(500)), list(range(1000, 1400))]
    assert [len(prompt) for prompt in cut(texts, 3, 400)] == [400, 300, 200]
    assert cut(texts, 2, 400)[1][0] == 1001
    with pytest.raises(SystemExit, match=r"--prompt 501: argparse has only 500 tokens"):
        cut(texts, 1, 501)
