"""A tiny run on the CPU: learns, can be stopped and continued, leaves a model folder that loads and is measured."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from data_gen.errors import InputError
from recipes.pocket_v4.config import PocketConfig
from recipes.pocket_v4.evaluate import evaluate
from recipes.pocket_v4.train import Trainer


@pytest.fixture(scope="module")
def recipe(tiny) -> PocketConfig:
    """Open for 100 steps, then sparse for 50."""
    settings = tiny.model_dump()
    common = {"length": 128, "batch": 1, "lr": (2e-3, 1e-3)}
    settings["stages"] = [common | {"steps": 100, "sparse": False}, common | {"steps": 50, "sparse": True}]
    settings["optimizer"]["warmup"] = 10
    settings["evaluation"] = {"lengths": [128], "documents": 3, "comparisons": 2, "tokens": 256, "distractors": 2}
    return PocketConfig.model_validate(settings)


def train(recipe, out, seconds=float("inf")):
    """Whether the run finished, and its trainer. With 0 seconds it stops at its next report, in 50 steps."""
    trainer = Trainer(recipe, out, workers=0, seconds=seconds)
    return trainer.run(), trainer


def parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    finished, trainer = train(recipe, out)
    assert finished
    trainer.export()
    return trainer


def test_a_stopped_run_goes_on_where_it_was(recipe, whole, tmp_path):
    finished, first = train(recipe, tmp_path, seconds=0)
    assert not finished and first.progress["step"] == 50
    (tmp_path / "checkpoint.partial").write_bytes(b"a save that was cut short")
    second = Trainer(recipe, tmp_path, workers=0, seconds=float("inf"))
    compared = 0
    for before, after in zip(first.optimizers, second.optimizers, strict=True):
        for old, new in zip(parameters(before), parameters(after), strict=True):
            assert old.equal(new)
            assert before.state[old].keys() == after.state[new].keys()
            for name, kept in before.state[old].items():
                torch.testing.assert_close(after.state[new][name], kept, rtol=2**-8, atol=0)  # moments rest in bf16
                compared += 1
    assert compared > 100
    assert second.run() and second.progress["steps"] == whole.progress["steps"] == 150
    start = Trainer(recipe, tmp_path / "fresh", workers=0, seconds=0).model.state_dict()
    moved = drift = 0.0
    for name, weights in whole.model.state_dict().items():
        if weights.is_floating_point():
            moved += float((weights - start[name]).square().sum())
            drift += float((weights - second.model.state_dict()[name]).square().sum())
    # the rounding of the moments has grown through 100 more steps
    assert drift**0.5 < 0.15 * moved**0.5
    read = [[json.loads(line) for line in (t.out / "log.jsonl").open()] for t in (whole, second)]
    assert [(r["stage"], r.get("step")) for r in read[0]] == [(r["stage"], r.get("step")) for r in read[1]]


def test_the_loss_falls_and_the_indexer_learns(whole):
    reports = [json.loads(line) for line in (whole.out / "log.jsonl").open()]
    steps = [report for report in reports if "step" in report]
    assert steps[-1]["text"] < steps[0]["text"] - 0.5
    assert all(0 < report["recall"] <= 1.0001 for report in steps)
    assert next(set(report["accuracy"]) for report in reports if "accuracy" in report) >= {"single", "copy"}


def test_the_exported_folder_loads_and_is_measured(recipe, whole):
    folder = whole.out / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weights in whole.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weights.to(torch.bfloat16).float())
    assert "Not measured yet" in (folder / "README.md").read_text()
    evaluate(folder, recipe)
    row = json.loads((folder / "evaluation.json").read_text())["lengths"]["128"]
    assert set(row) == {"topk", "open", "closed", "recall", "seconds"}
    assert 0 < row["recall"] < 1
    assert all(0 <= share <= 1 for setting in ("topk", "open", "closed") for share in row[setting].values())
    card = (folder / "README.md").read_text()
    assert "| its own top-k | 128 |" in card and "| 1 | 128 | 1 | top-k | 50 |" in card


def test_damaged_and_foreign_checkpoints_are_refused(recipe, whole, tmp_path):
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    with pytest.raises(InputError, match="another recipe"):
        Trainer(other, whole.out, workers=0, seconds=0)
    for damage in (b"", b"not a checkpoint", (whole.out / "checkpoint.pt").read_bytes()[:5000]):
        (tmp_path / "checkpoint.pt").write_bytes(damage)
        with pytest.raises(InputError, match="damaged"):
            Trainer(recipe, tmp_path, workers=0, seconds=0)


def test_a_recipe_with_a_mistake_is_refused(recipe):
    settings = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    for change in ({"stges": []}, {"model": recipe.model | {"num_hidden_layers": 3}}):
        with pytest.raises(ValueError, match=r"stges|num_hidden_layers"):
            PocketConfig.model_validate(settings | change)
