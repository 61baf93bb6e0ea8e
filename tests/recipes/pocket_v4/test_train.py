"""A tiny run on the CPU: learns, can be stopped and continued, leaves a model folder that loads and is measured."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from data_gen.core.errors import InputError
from recipes.pocket import train as training
from recipes.pocket.config import PocketConfig
from recipes.pocket.evaluate import documents_of, open_recall, readings, weights_digest
from recipes.pocket.tasks import TASKS
from recipes.pocket.train import Trainer
from recipes.pocket_v4.model import FAMILY
from recipes.pockets import main


@pytest.fixture(scope="module")
def recipe(tiny) -> PocketConfig:
    """Open for 100 steps, then sparse for 50."""
    settings = tiny.model_dump()
    common = {"length": 128, "batch": 1, "lr": (3e-3, 1e-3)}
    settings["stages"] = [common | {"steps": 100, "sparse": False}, common | {"steps": 50, "sparse": True}]
    settings["optimizer"]["warmup"] = 10
    settings["evaluation"] = {"lengths": [128], "documents": 3, "comparisons": 2, "tokens": 256, "distractors": 2}
    return PocketConfig.model_validate(settings)


def train(recipe, out, seconds=float("inf")):
    """Whether the run finished, and its trainer. With 0 seconds it stops at its next report, in 50 steps."""
    trainer = Trainer(FAMILY, recipe, out, workers=0, seconds=seconds)
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
    spent = first.progress["seconds"]
    second = Trainer(FAMILY, recipe, tmp_path, workers=0, seconds=float("inf"))
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
    assert second.progress["seconds"] > spent > 0 and second.progress["peak_bytes"] > 1e8
    start = Trainer(FAMILY, recipe, tmp_path / "fresh", workers=0, seconds=0).model.state_dict()
    moved = drift = 0.0
    for name, weights in whole.model.state_dict().items():
        if weights.is_floating_point():
            moved += float((weights - start[name]).square().sum())
            drift += float((weights - second.model.state_dict()[name]).square().sum())
    # the rounding of the moments has grown through 100 more steps
    assert drift**0.5 < 0.15 * moved**0.5
    read = [[json.loads(line) for line in (t.out / "log.jsonl").open()] for t in (whole, second)]
    assert [(r["stage"], r.get("step")) for r in read[0]] == [(r["stage"], r.get("step")) for r in read[1]]


class Killed(BaseException):
    pass


def steps_logged(trainer):
    return [json.loads(line)["step"] for line in trainer.journal.open()]


def test_a_killed_run_goes_on_from_its_last_checkpoint(recipe, tmp_path, monkeypatch):
    """And its log has nothing of what will be done again."""
    report = Trainer.report
    monkeypatch.setattr(training, "REPORT", 2)
    monkeypatch.setattr(training, "SAVE", 4)

    def log_when_killed_at(step):
        def deadly(self, stage, metrics):
            needle = report(self, stage, metrics)
            if self.progress["step"] == step:
                raise Killed
            return needle

        monkeypatch.setattr(Trainer, "report", deadly)
        with pytest.raises(Killed):
            train(recipe, tmp_path)
        return steps_logged(Trainer(FAMILY, recipe, tmp_path, workers=0, seconds=0))

    assert log_when_killed_at(2) == []
    assert log_when_killed_at(6) == [2, 4]
    resumed = Trainer(FAMILY, recipe, tmp_path, workers=0, seconds=0)
    assert resumed.progress["step"] == resumed.progress["steps"] == 4 and 0 < resumed.progress["seconds"] < 600


def test_the_loss_falls_and_the_indexer_learns(recipe, whole):
    """The indexers themselves find more of the attention than others in the same model would."""
    reports = [json.loads(line) for line in whole.journal.open()]
    steps = [report for report in reports if "step" in report]
    assert steps[-1]["text"] < steps[0]["text"] - 0.5
    assert steps[1]["kl"] < 0.7 * steps[0]["kl"]  # both of the open stage
    tests = {task: documents_of(recipe, task, 128, 4) for task in TASKS}

    def measured(model):
        found = [one for documents in tests.values() for one in readings(FAMILY, model, whole.tokenizer, documents, 2)]
        return open_recall(FAMILY, model, whole.tokenizer, tests, 2), sum(float(one.kl) for one in found) / len(found)

    recall, kl = measured(whole.model)
    for seed in (101, 102, 103):
        other = FAMILY.build(recipe.model_copy(update={"seed": seed}), whole.tokenizer).eval()
        backbone = {name: value for name, value in whole.model.state_dict().items() if ".indexer." not in name}
        other.load_state_dict(backbone, strict=False)
        their_recall, their_kl = measured(other)
        assert recall > their_recall + 0.01 and kl < 0.5 * their_kl


def test_stages_end_with_what_the_indexer_recalls(whole):
    ends = [json.loads(line) for line in whole.journal.open() if "accuracy" in line]
    assert all(set(end["accuracy"]) == set(TASKS) for end in ends)
    assert all(0.05 < end["recall"] < 0.5 for end in ends)  # four of 32 entries


def test_recall_is_not_reported_where_the_top_k_holds_every_entry(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "log", lambda self, **record: logged.append(record))
    trainer, logged = Trainer(FAMILY, recipe, tmp_path, workers=0, seconds=0), []
    trainer.model.config.index_topk = 32
    trainer.examine(recipe.stages[0])
    assert logged[0]["recall"] is None and logged[0]["length"] == 128


def test_the_exported_folder_loads_and_is_measured(recipe, whole, tmp_path):
    folder = shutil.copytree(whole.out / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weights in whole.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weights.to(torch.bfloat16).float())
    run = json.loads((folder / "training.json").read_text())
    assert run["seconds"] > 1 and 1e8 < run["peak_bytes"] < 1e10
    assert "Not measured yet" in (folder / "README.md").read_text()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    main(["evaluate", "pocket_v4", str(folder), "--config", str(folder / "recipe.yaml")])
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["weights"] == weights_digest(folder)
    row = report["lengths"]["128"]
    assert set(row) == {"topk", "open", "closed", "recall", "seconds"}
    assert 0 < row["recall"] < 1
    assert all(0 <= share <= 1 for setting in ("topk", "open", "closed") for share in row[setting].values())
    card = (folder / "README.md").read_text()
    assert "| its own top-k | 128 |" in card and "| 1 | 128 | 1 | top-k | 50 |" in card


def test_a_part_is_measured_into_a_file_of_its_own(recipe, whole, tmp_path):
    folder, config = whole.out / "model", tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def call(*arguments):
        main(["evaluate", "pocket_v4", str(folder), "--config", str(config), *map(str, arguments)])

    with pytest.raises(SystemExit, match="name a file for it with --out"):
        call("--lengths", 96)
    call("--lengths", 96, "--documents", 1, "--out", tmp_path / "part.json")
    report = json.loads((tmp_path / "part.json").read_text())
    assert list(report["lengths"]) == ["96"] and (report["documents"], report["comparisons"]) == (1, 1)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_damaged_and_foreign_checkpoints_are_refused(recipe, whole, tmp_path):
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    with pytest.raises(InputError, match="another recipe"):
        Trainer(FAMILY, other, whole.out, workers=0, seconds=0)
    for damage in (b"", b"not a checkpoint", (whole.out / "checkpoint.pt").read_bytes()[:5000]):
        (tmp_path / "checkpoint.pt").write_bytes(damage)
        with pytest.raises(InputError, match="damaged"):
            Trainer(FAMILY, recipe, tmp_path, workers=0, seconds=0)


def test_a_recipe_with_a_mistake_is_refused(recipe):
    settings = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    for change in ({"stges": []}, {"model": recipe.model | {"num_hidden_layers": 3}}):
        with pytest.raises(ValueError, match=r"stges|num_hidden_layers"):
            PocketConfig.model_validate(settings | change)
