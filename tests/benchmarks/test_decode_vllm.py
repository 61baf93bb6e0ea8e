"""The parts of benchmarks/decode_vllm.py that need no engine."""

import json

import pytest

from benchmarks.decode_vllm import LLAMA, TOY, cells, differences, keep, operations, prompt, steady, write_model
from data_gen.core.fingerprint import checkpoint_tensors, fingerprint
from indexer_train.formats.bundle import load_scorer


def test_the_rate_is_of_the_time_in_which_all_are_decoded():
    """Alone at first, at a token a second; then two; then alone again."""
    assert steady([[0.0, 1.0, 2.0, 2.5, 3.0, 3.5], [2.0, 2.5, 3.0, 3.5, 4.5]]) == 4.0
    with pytest.raises(SystemExit, match="raise --new"):
        steady([[0.0, 1.0], [2.0, 3.0]])


def test_shorter_prompts_begin_longer_ones_and_come_later():
    assert prompt(3, 20, 50)["prompt_token_ids"] == prompt(3, 90, 50)["prompt_token_ids"][:20]
    assert prompt(3, 20, 50) != prompt(4, 20, 50)
    assert cells([16, 64], [1, 2, 8], 128) == [(64, 2), (64, 1), (16, 8), (16, 2), (16, 1)]


def test_the_bundle_is_of_the_model(tmp_path):
    folder = tmp_path / "model"
    write_model(folder, LLAMA | TOY | {"num_hidden_layers": 8})
    spec = load_scorer(folder / "bundle").spec
    assert spec.layers == [2, 4, 6]
    assert spec.backbone == fingerprint(checkpoint_tensors(folder))


def test_a_profile_counts_the_device_or_the_outermost_of_the_cpu():
    def event(cat, name, ts, dur, tid=1):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}

    cpu = [event("cpu_op", "add", 4, 3), event("cpu_op", "linear", 10, 30), event("cpu_op", "addmm", 12, 20),
           event("cpu_op", "add", 13, 3, tid=2), {"ph": "i", "name": "mark"}]  # fmt: skip
    assert operations(cpu, 2) == {"add": (1.0, pytest.approx(0.003)), "linear": (0.5, pytest.approx(0.015))}
    assert operations([*cpu, event("kernel", "gemm", 1, 8)], 4) == {"gemm": (0.25, pytest.approx(0.002))}


def test_what_differs_most_in_time_is_said_and_what_an_engine_leaves_to_the_host(tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"rows": []}))
    for server, step_ms, profile in (
        ("stock", 2.0, {"a": (8, 1.5)}),
        ("lookahead", 3.0, {"a": (8, 0.5), "b": (2, 0.1)}),
    ):
        named = {"server": server, "context": 64, "batch": 2}
        keep(out, named | {"step_ms": step_ms}, vllm="0")
        keep(out, named | {"profile": profile})
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 and json.loads(out.read_text())["vllm"] == "0"
    lines = differences(rows).splitlines()
    assert "+0.500 ms of everything else" in lines[0] and "+2.400 ms of everything else" in lines[1]
    assert [line.split() for line in lines[2:]] == [["+0.00", "-1.0000", "ms", "a"], ["+2.00", "+0.1000", "ms", "b"]]
