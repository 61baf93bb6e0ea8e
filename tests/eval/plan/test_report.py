"""The paper's figures, the command line, the files it writes, and what bad input gets."""

import itertools
import json
import signal
import sys

import numpy as np
import pytest
from matplotlib import image

import cli
from benchmarks import tiny_models
from eval.plan import PlanSettings, make_plan
from eval.plan.load import SHIPPED
from eval.plan.report import PLOT_CONTEXTS, context_label, plan_text
from recipes import load_recipe

PAPER = {262144: (0.94, 50.8, 28.8), 524288: (1.87, 73.5, 31.0), 1048576: (3.73, 118.9, 35.4)}


@pytest.fixture
def lookahead(capsys, monkeypatch):
    """Run the command in this process: arguments -> (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lookahead", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_v4_flash_meets_the_paper(lookahead):
    contexts = [argument for context in PAPER for argument in ("--context", context)]
    code, out, _ = lookahead("plan", "deepseek-v4-flash", *contexts, "--json")
    rows = json.loads(out)
    assert code == 0 and [row["context"] for row in rows] == list(PAPER)
    for row in rows:
        kv, full, lsa = PAPER[row["context"]]
        assert row["kv_gb_full"] == pytest.approx(kv, rel=0.02)
        assert row["gflop_full_paper"] == pytest.approx(full, rel=0.005)
        assert row["gflop_lsa_paper"] == pytest.approx(lsa, rel=0.005)
        assert row["gflop_full"] > row["gflop_full_paper"] and row["gflop_lsa"] > row["gflop_lsa_paper"]
        assert row["gflop_full"] / row["gflop_lsa"] < full / lsa  # what the paper leaves out flatters its ratio
        assert row["kv_gb_lsa"] < row["kv_gb_full"]


@pytest.mark.parametrize(("side", "stated"), [("full", 1), ("lsa", 2)])
def test_no_other_choice_of_terms_comes_closer_to_the_paper(side, stated):
    rows = make_plan("deepseek-v4-flash", list(PAPER)).rows
    terms = rows[0]["gflop_terms"]
    fixed = [name for name in terms if terms[name]["paper_full"] and terms[name]["paper_lsa"]]
    open_ones = [name for name in terms if name not in fixed]

    def deviation(chosen):
        return max(
            abs(sum(row["gflop_terms"][name][side] for name in [*fixed, *chosen]) / PAPER[row["context"]][stated] - 1)
            for row in rows
        )

    choices = [choice for size in range(len(open_ones) + 1) for choice in itertools.combinations(open_ones, size)]
    ours = tuple(name for name in open_ones if terms[name][f"paper_{side}"])
    assert deviation(ours) == min(map(deviation, choices)) < 0.003


def test_text_stands_beside_the_paper_only_where_comparable():
    text = plan_text(make_plan("deepseek-v4-flash", list(PAPER)))
    assert "118.9 / 118.86" in text and "in neither, HCA attention 21.47" in text
    assert "Beside the paper" not in plan_text(make_plan("deepseek-v4-flash", [4096]))
    assert "Beside the paper" not in plan_text(make_plan("deepseek-v4-pro", list(PAPER)))
    assert "Beside the paper" not in plan_text(make_plan("deepseek-v4-flash", list(PAPER), PlanSettings(kept=0.5)))


def test_an_unnamed_dtype_is_said(tmp_path):
    write(tmp_path, LLAMA)
    assert "bfloat16 is assumed" in plan_text(make_plan(str(tmp_path), [64]))
    write(tmp_path, LLAMA | {"dtype": "float16"})
    assert "is assumed" not in plan_text(make_plan(str(tmp_path), [64]))


def test_files(lookahead, tmp_path, tiny):
    _, folder = tiny
    code, out, _ = lookahead("plan", folder, "--out", tmp_path / "plan", "--gpu-memory", 80, "--gpus", 2)
    assert code == 0 and "requests LSA" in out and "beyond that" in out
    assert (tmp_path / "plan" / "plan.md").read_text() == out
    rows = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [row["context"] for row in rows] == [2**power for power in range(15, 21)]
    assert not rows[0]["within_model"]
    pixels = image.imread(tmp_path / "plan" / "plan.png")[..., :3]
    height, width, _ = pixels.shape
    for row in (0, 1):
        for column in (0, 1):
            panel = pixels[row * height // 2 : (row + 1) * height // 2, column * width // 2 : (column + 1) * width // 2]
            assert np.ptp(panel, axis=2).max() > 0.5, (row, column)  # colour: something is stacked there
            assert (panel < 0.9).any(axis=2).mean() > 0.01
    assert PLOT_CONTEXTS[-1] == 2**20


SHIPPED_NAMES = sorted(file.name.removesuffix(".json") for file in SHIPPED.iterdir() if file.name.endswith(".json"))


@pytest.mark.parametrize("name", [*SHIPPED_NAMES, "a folder of a plain MLA"])
def test_all_files_are_written_of_every_kind_of_model(lookahead, tmp_path, name):
    if name not in SHIPPED_NAMES:
        name = tmp_path / "model"
        tiny_models.tiny("deepseek_v3").config.save_pretrained(name)
    code, out, err = lookahead("plan", name, "--out", tmp_path / "plan")
    assert (code, err) == (0, "")
    assert sorted(file.name for file in (tmp_path / "plan").iterdir()) == ["plan.json", "plan.md", "plan.png"]
    assert (tmp_path / "plan" / "plan.md").read_text() == out


def test_a_recipe_sets_the_indexer():
    recipe = load_recipe("smollm2-quickstart")
    settings = PlanSettings.of(recipe.trace, recipe.indexer)
    assert (settings.heads, settings.rank, settings.indexer_layers, settings.chunk_tokens) == (16, 128, 3, 16)


@pytest.mark.parametrize(("context", "label"), [(2**18, "256K"), (2**21, "2M"), (100_001, "100,001")])
def test_context_label(context, label):
    assert context_label(context) == label


def write(folder, content):
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
         "intermediate_size": 48}  # fmt: skip
V4 = {"model_type": "deepseek_v4", "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ([1], "no model_type"),
        ({"hidden_size": 3}, "no model_type"),
        ({"model_type": "abacus"}, "not a configuration that transformers reads"),
        (LLAMA | {"hidden_size": "wide"}, "not a configuration that transformers reads"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights"),
        ({"model_type": "gpt2"}, "intermediate_size is None"),
        (LLAMA | {"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
        ({"model_type": "mixtral", "num_hidden_layers": 2, "sliding_window": None}, "not laid out like Llama"),
        ({"model_type": "bert"}, "not laid out like Llama"),
        (LLAMA | {"model_type": "mistral", "sliding_window": 8}, "no layer sees the whole context"),
        (LLAMA | {"model_type": "qwen3_next"}, "layers of kind linear_attention"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (V4, "neither layer_types nor compress_ratios"),
        (V4 | {"compress_ratios": [0, 128]}, "no compressed sparse attention"),
        (LLAMA | {"head_dim": 0}, "transformers builds no causal model"),
        (V4 | {"compress_ratios": [0, 4], "o_groups": 0}, "o_groups is 0"),
        (V4 | {"compress_ratios": [4]}, "not a configuration that transformers reads"),
        (V4 | {"compress_ratios": [0, 5]}, "not a configuration that transformers reads"),
        (V4 | {"compress_ratios": [4, 4], "quantization_config": {"quant_method": "awq"}}, "weights are known as fp8"),
    ],
)
def test_a_bad_configuration_gets_one_line(lookahead, tmp_path, content, said):
    code, out, err = lookahead("plan", write(tmp_path, content))
    assert code == 2 and out == ""
    assert said in err and str(tmp_path) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["deepseek-v5"],
            "neither a folder with a config.json nor one of deepseek-v3.2, deepseek-v4-flash, deepseek-v4-pro, glm-5",
        ),
        (["deepseek-v4-flash", "--context", "0"], "--context"),
        (["deepseek-v4-flash", "--kept", "1.5"], "--kept"),
        (["deepseek-v4-flash", "--recipe", "smollm2-quickstart"], "one compressed entry of 4 tokens, not 16"),
    ],
)
def test_bad_arguments_get_one_line(lookahead, arguments, said):
    code, out, err = lookahead("plan", *arguments)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1
