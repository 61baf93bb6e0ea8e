"""What a long run must survive and may ask for: kills, damage, several processes, bf16, accumulation, wandb."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

from data_gen.core.errors import InputError
from data_gen.core.files import replace_sealed, seal_folder
from data_gen.traces.store import TraceStore
from indexer_train import processes
from indexer_train.checkpoints import checkpoints, damage
from indexer_train.config import IndexerConfig
from indexer_train.data.batches import DocumentBatchSampler, window_index
from indexer_train.load import load_indexer
from indexer_train.model import MemoryIndexer
from indexer_train.training import resume, tracking
from indexer_train.training import trainer as trainer_module
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.resume import newest_whole, stay_with_best
from indexer_train.training.trainer import train
from tests.indexer_train.training.trainers import make_trainer

ROOT = Path(__file__).parents[3]
SHAPE = IndexerConfig(heads=16, rank=32)
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
import cli
from indexer_train.data import batches
from indexer_train.training import trainer

out, kill = Path(sys.argv.pop()), int(sys.argv.pop())
rank = os.environ.get("RANK", 0)

class KillAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

class KeepLast(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):  # what follows loads the best, saved by one rank
        if state.global_step == state.max_steps:
            torch.save(model.state_dict(), out / f"last-{rank}.pt")

class Diary(batches.AllCandidates):
    def __call__(self, rows):
        with open(out / f"read-{rank}.txt", "a") as file:
            print(int(self.epoch), rows[0]["document"], file=file)
        return super().__call__(rows)

trainer.AllCandidates = Diary
stock, train = trainer.IndexerTrainer, trainer.train
trainer.IndexerTrainer = lambda *args, callbacks, **more: stock(
    *args, callbacks=[*callbacks, KillAt(), KeepLast()], **more
)
trainer.train = lambda *args: torch.save(train(*args).state_dict(), out / f"weights-{rank}.pt")
cli.main()
"""


KEPT = ("last", "weights")
"""What it keeps of each process: weights after the last step, and those of the best checkpoint."""


def call(store, out, config, kill=0, launcher=(), environment=os.environ):
    """`lookahead train` in a process of its own (or several), with a diary of what it reads."""
    script, recipe = out.parent / "train.py", out.parent / "recipe.yaml"
    script.write_text(SCRIPT)
    sections = {"indexer": SHAPE, "train": config, "trace": store.manifest.trace}
    settings = {name: section.model_dump(mode="json") for name, section in sections.items()}
    settings |= {"backbone": {"path": "unused"}, "documents": {"tokens": [1, 1], "train": {}, "heldout": {}}}
    recipe.write_text(yaml.safe_dump(settings))
    arguments = ["train", recipe, "--traces", store.root, "--out", out, kill, out]
    command = [sys.executable, *launcher, script, *arguments]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=out.parent)


@pytest.fixture
def settings(tiny_recipe):
    return tiny_recipe.train.model_copy(
        update={"epochs": 4, "learning_rate": 3e-3, "windows_per_document": 32, "clip": 0.0}
    )


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Gradients(TrainerCallback):
    """Remembers every step's gradient as the optimizer sees it."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))


def gradients(store, settings, out):
    trainer, seen = make_trainer(store, SHAPE, settings, out), Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.seen


def test_accumulated_gradients_are_the_mean_over_batches(planted, settings, tmp_path):
    still = settings.model_copy(update={"epochs": 1, "learning_rate": 1e-30})  # the weights stay: batches compare
    single = gradients(planted[0], still, tmp_path / "a")
    double = gradients(planted[0], still.model_copy(update={"accumulation": 2}), tmp_path / "b")
    assert len(single) == 36 and len(double) == 18
    for step, gradient in enumerate(double):
        torch.testing.assert_close(gradient, (single[2 * step] + single[2 * step + 1]) / 2, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_to_the_length_asked_for(planted, settings, tmp_path):
    asked = settings.model_copy(update={"epochs": 1, "clip": 0.01, "learning_rate": 1e-30})
    free = gradients(planted[0], asked.model_copy(update={"clip": 0.0}), tmp_path / "a")
    for clipped, whole in zip(gradients(planted[0], asked, tmp_path / "b"), free, strict=True):
        assert float(whole.norm()) > 0.01
        torch.testing.assert_close(clipped, whole * 0.01 / whole.norm(), atol=1e-6, rtol=1e-3)


def test_the_rate_rises_through_the_warm_up_and_falls_along_a_cosine(planted, settings, tmp_path):
    asked = settings.model_copy(update={"epochs": 2, "warmup": 0.25, "learning_rate": 2e-3})
    trainer, rates = make_trainer(planted[0], SHAPE, asked, tmp_path), []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer.add_callback(Rates())
    trainer.train()
    rising = [2e-3 * step / 18 for step in range(18)]
    falling = [1e-3 * (1 + math.cos(math.pi * step / 54)) for step in range(54)]
    assert rates == pytest.approx(rising + falling)


@pytest.mark.parametrize("kind", ["all", "sampled"])
def test_bf16_covers_scoring_and_follows_fp32(planted, settings, tmp_path, monkeypatch, kind):
    scored_in, layer_logits = set(), MemoryIndexer.layer_logits

    def spy(self, queries, keys, chunks=None, candidates=None, dtype=torch.float32):
        if torch.is_grad_enabled():  # training; evaluation stays in fp32
            scored_in.add(dtype)
        return layer_logits(self, queries, keys, chunks, candidates, dtype)

    monkeypatch.setattr(MemoryIndexer, "layer_logits", spy)
    candidates = settings.candidates.model_copy(update={"kind": kind})
    still = settings.model_copy(update={"epochs": 1, "learning_rate": 1e-30, "candidates": candidates})
    exact = gradients(planted[0], still, tmp_path / "a")
    assert scored_in == {torch.float32}
    scored_in.clear()
    rough = gradients(planted[0], still.model_copy(update={"precision": "bfloat16"}), tmp_path / "b")
    assert scored_in == {torch.bfloat16}
    for one, other in zip(exact, rough, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.995
    longer = settings.model_copy(update={"epochs": 8, "precision": "bfloat16", "candidates": candidates})
    indexer = train(planted[0], SHAPE, longer, tmp_path / "c")
    assert all(parameter.dtype == torch.float32 for parameter in indexer.parameters())
    assert MassRecallEvaluator(planted[1], settings.budget)(indexer)["mass_recall"] > 0.8
    queries, keys = torch.randn(5, indexer.query_encoder.get_embedding_dimension()), torch.randn(30, 64)
    queries[:, -1] = 120
    exact, rough = (indexer.layer_logits(queries, keys, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(rough, exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_a_run_that_diverges_ends_in_one_line_and_keeps_its_checkpoints(planted, settings, tmp_path):
    fair = settings.model_copy(update={"epochs": 2})
    trainer, checkpoints = make_trainer(planted[0], SHAPE, fair, tmp_path), tmp_path / "checkpoints"

    class Explode(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            torch.nn.init.constant_(next(model.parameters()), 1e38)

    trainer.add_callback(Explode())
    with pytest.raises(InputError, match=r"training diverged \(lower train.learning_rate"):
        trainer.train()
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-36"]
    assert damage(checkpoints / "checkpoint-36") is None
    done = call(planted[0], tmp_path / "out", fair.model_copy(update={"learning_rate": 1e30}))
    assert done.returncode == 2 and "lookahead: the indexer's scores are NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "indexer").exists()


def test_training_stops_early_and_the_best_checkpoint_is_kept(stores, tiny_recipe, tmp_path):
    wild = tiny_recipe.train.model_copy(update={"epochs": 40, "learning_rate": 0.1, "patience": 2})
    indexer = train(stores[0], tiny_recipe.indexer, wild, tmp_path)
    last = max((tmp_path / "checkpoints").glob("*/trainer_state.json"), key=lambda p: p.stat().st_mtime_ns)
    history = [row["eval_mass_recall"] for row in json.loads(last.read_text())["log_history"] if "eval_runtime" in row]
    assert 2 < len(history) < 40 and max(history) > max(history[-2:])
    _, validation = stores[0].hold_back(wild.validation_every)
    for kept in (indexer, load_indexer(tmp_path / "indexer")):
        assert MassRecallEvaluator(validation, wild.budget)(kept)["mass_recall"] == pytest.approx(max(history))


def test_the_checkpoint_with_the_lowest_peak_entropy_is_kept_where_the_recipe_chooses_by_it(
    stores, tiny_recipe, tmp_path
):
    wild = tiny_recipe.train.model_copy(
        update={"epochs": 40, "learning_rate": 0.1, "patience": 2, "choose": "peak_entropy"}
    )
    indexer = train(stores[0], tiny_recipe.indexer, wild, tmp_path)
    last = max((tmp_path / "checkpoints").glob("*/trainer_state.json"), key=lambda p: p.stat().st_mtime_ns)
    history = [row["eval_peak_entropy"] for row in json.loads(last.read_text())["log_history"] if "eval_runtime" in row]
    assert 2 < len(history) < 40 and min(history) < min(history[-2:])
    _, validation = stores[0].hold_back(wild.validation_every)
    found = MassRecallEvaluator(validation, wild.budget)(indexer)["peak_entropy"]
    assert found == pytest.approx(min(history))


def test_a_run_that_had_stopped_early_only_finishes_wherever_it_was_moved(stores, tiny_recipe, tmp_path, monkeypatch):
    wild = tiny_recipe.train.model_copy(update={"epochs": 40, "learning_rate": 0.1, "patience": 2})
    whole = train(stores[0], tiny_recipe.indexer, wild, tmp_path / "whole")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer_module, "_finish", killed)
        train(stores[0], tiny_recipe.indexer, wild, tmp_path / "killed")
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    resumed = train(stores[0], tiny_recipe.indexer, wild, tmp_path / "moved")
    same(resumed.state_dict(), whole.state_dict())
    assert resumed.spec == whole.spec
    folders = [tmp_path / name / "checkpoints" for name in ("whole", "moved")]
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in folders}) == 1
    newest = newest_whole(folders[1])
    best = Path(json.loads((newest / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.parent == folders[1] and best.is_dir() and best != newest
    shutil.rmtree(best)
    with pytest.raises(InputError, match=rf"{best}: damaged best checkpoint \(it is missing"):
        stay_with_best(newest)


def test_kill_9_at_a_random_step_and_resume_ends_bit_identical(planted, settings, tmp_path):
    settings = settings.model_copy(update={"loss": "contrastive", "accumulation": 2})  # the loss learns something too
    whole = train(planted[0], SHAPE, settings, tmp_path / "whole")
    step = random.Random(os.urandom(8)).randrange(19, 72)
    print("killed at step", step)
    done = call(planted[0], tmp_path / "killed", settings, kill=step)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    resumed = train(planted[0], SHAPE, settings, tmp_path / "killed", {planted[0].root: 1.0})
    same(resumed.state_dict(), whole.state_dict())
    assert resumed.spec == whole.spec


def test_no_checkpoint_goes_before_the_new_one_is_whole(planted, settings, tmp_path, monkeypatch):
    whole = train(planted[0], SHAPE, settings, tmp_path / "whole")
    seal, sealed = resume.seal_folder, []

    def killed(folder):
        sealed.append(folder)
        if len(sealed) == 4:
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr(resume, "seal_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        train(planted[0], SHAPE, settings, tmp_path / "killed")
    left = [damage(path) for path in checkpoints(tmp_path / "killed" / "checkpoints")]
    assert left == [None, None, "loss.safetensors was added"]  # behind the seal of the indexer in it
    (tmp_path / "killed" / ".unfinished-x.json").write_text("of the run that was killed")
    resumed = train(planted[0], SHAPE, settings, tmp_path / "killed")
    same(resumed.state_dict(), whole.state_dict())
    assert len(checkpoints(tmp_path / "killed" / "checkpoints")) == 2
    assert not list((tmp_path / "killed").rglob("damaged-*"))
    assert not list((tmp_path / "killed").rglob(".unfinished-*"))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_checkpoints_are_set_aside_and_half_saved_ones_removed(planted, settings, tmp_path):
    train(planted[0], SHAPE, settings, tmp_path)
    folder = tmp_path / "checkpoints"
    good = newest_whole(folder)
    number = int(good.name.split("-")[1])
    damages = ["loss.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth", "model.safetensors"]
    for newer, name in enumerate(damages, start=number + 1):
        shutil.copytree(good, folder / f"checkpoint-{newer}")
        file = next((folder / f"checkpoint-{newer}").rglob(name))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        content = files_of(folder / f"checkpoint-{newer}")
        assert newest_whole(folder) == good, name
        assert files_of(folder / f"damaged-checkpoint-{newer}") == content  # nothing of the user's is deleted
        assert not (folder / f"checkpoint-{newer}").exists()
    for newer, (name, content) in enumerate({"trainer_state.json": "[]", "spec.json": "{}"}.items(), start=number + 1):
        shutil.copytree(good, folder / f"checkpoint-{newer}")
        next((folder / f"checkpoint-{newer}").rglob(name)).write_text(content)
        assert newest_whole(folder) == good, name
        assert (folder / f"damaged-checkpoint-{newer}-1").exists()  # beside what is left of the first one
    shutil.copytree(good, folder / "checkpoint-old")  # somebody's copy is nobody's business
    assert newest_whole(folder) == good and (folder / "checkpoint-old").exists()
    half = folder / "checkpoint-9999"
    for sealed in (False, True):  # killed before or after the indexer in it was sealed
        shutil.copytree(good, half, ignore=shutil.ignore_patterns("loss.safetensors", "checksums.json"))
        if sealed:
            seal_folder(half)
        (half / ".unfinished-x.safetensors").touch()
        assert newest_whole(folder) == good and not list(folder.glob("*-9999*"))
    (good / "rng_state.pth").unlink()
    assert damage(good) == "rng_state.pth is missing"


@pytest.mark.parametrize("how", ["cut short", "one bit of it flipped"])
def test_a_damaged_shard_is_named_before_training_starts(planted, settings, tmp_path, how):
    shutil.copytree(planted[0].root, tmp_path / "store")
    store = TraceStore.open(tmp_path / "store")
    shard = store.paths()[17]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content[: -40 if how == "cut short" else len(content)])
    with pytest.raises(InputError, match=f"{shard.name}: damaged trace"):
        train(store, SHAPE, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut_short(paths):
    paths[17].write_bytes(paths[17].read_bytes()[:-40])
    return f"{paths[17].name}: damaged trace"


def exchanged(paths):
    paths[17].write_bytes(paths[18].read_bytes())
    return f"{paths[17].name}: damaged trace .it holds 18"


def another_fact(paths):
    manifest = paths[0].parents[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"key_width": 32', '"key_width": 33'))
    return "manifest.json: damaged manifest"


def taken_away(paths):
    paths[17].unlink()
    return "1 of 48 documents are missing"


@pytest.mark.parametrize("spoil", [cut_short, exchanged, another_fact, taken_away])
def test_what_is_refused_where_not_every_byte_is_checked(planted, settings, tmp_path, spoil):
    shutil.copytree(planted[0].root, tmp_path / "store")
    complaint = spoil(TraceStore.open(tmp_path / "store").paths())
    with pytest.raises(InputError, match=complaint):
        quick = settings.model_copy(update={"check_bytes": False})
        train(TraceStore.open(tmp_path / "store"), SHAPE, quick, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_processes_end_with_the_same_weights_from_disjoint_documents(planted, settings, tmp_path):
    settings = settings.model_copy(update={"loss": "contrastive", "epochs": 2, "validation_every": 4})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = call(planted[0], tmp_path / "two", settings, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    last, weights = ([torch.load(tmp_path / "two" / f"{name}-{rank}.pt") for rank in (0, 1)] for name in KEPT)
    same(*last)
    same(*weights)
    read = [
        [tuple(map(int, line.split())) for line in (tmp_path / "two" / f"read-{rank}.txt").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert len(read[0]) == len(read[1]) == 2 * 18
    assert len({*read[0], *read[1]}) == 2 * 36  # (epoch, document), each once
    checkpoint = newest_whole(tmp_path / "two" / "checkpoints")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] = False  # as if it had been killed
    replace_sealed(checkpoint / "trainer_state.json", checkpoint, lambda file: file.write_text(json.dumps(state)))
    shutil.rmtree(tmp_path / "two" / "indexer")
    with pytest.raises(InputError, match=f"{checkpoint}: made by 2 processes, and 1 would continue"):
        train(planted[0], SHAPE, settings, tmp_path / "two", {planted[0].root: 1.0})
    (checkpoint / "rng_state_1.pth").unlink()
    assert damage(checkpoint) == "rng_state_1.pth is missing"
    single = settings.model_copy(update={"accumulation": 2})
    alone = train(planted[0], SHAPE, single, tmp_path / "one")
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(weights[0][name], value, atol=1e-4, rtol=0)


def test_documents_that_do_not_go_round_are_left_out_in_turns(planted, monkeypatch):
    index = window_index(planted[0])
    monkeypatch.setattr(processes, "count", lambda: 5)
    sampler, left_out = DocumentBatchSampler(index, batch_size=8), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        read = {index[batch[0]]["document"] for batch in sampler}
        assert len(list(sampler)) == len(sampler) == len(read) == 45
        left_out.append(frozenset(range(48)) - read)
    assert len(set(left_out)) == 4


def test_nothing_is_tracked_unless_the_recipe_says_so(planted, settings, tmp_path):
    done = call(planted[0], tmp_path / "out", settings.model_copy(update={"epochs": 1}))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wandb" not in done.stderr and not (tmp_path / "out" / "wandb").exists()


def test_an_unknown_tracker_is_refused(planted, settings, tmp_path):
    asked = settings.model_copy(update={"report_to": ["wandb", "nowhere"]})
    with pytest.raises(InputError, match=r"report_to: not installed: nowhere; choose from .*wandb"):
        train(planted[0], SHAPE, asked, tmp_path)


def test_unconfigured_wandb_is_offline_and_holds_recipe_and_recall(planted, settings, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    (tmp_path / "home").mkdir()
    settings = settings.model_copy(update={"epochs": 1, "report_to": ["wandb"]})
    done = call(planted[0], tmp_path / "out", settings, environment=environment | {"HOME": str(tmp_path / "home")})
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    found = log.read_bytes()
    for part in (b"recipe", b"windows_per_document", b"distance_bumps", b"eval/mass_recall"):
        assert part in found, part


@pytest.mark.parametrize("where", ["NETRC", "HOME"])
def test_a_wandb_login_is_honoured(tmp_path, monkeypatch, where):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    login = tmp_path / (".netrc" if where == "HOME" else "elsewhere")
    if where == "NETRC":
        monkeypatch.setenv("NETRC", str(login))
    login.write_text("machine wandb.example login user password made-up\n")
    login.chmod(0o600)
    before = dict(os.environ)
    assert tracking.wandb_mode() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.example")
    assert tracking.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracking.wandb_mode() is None
    assert os.environ == before | {"WANDB_BASE_URL": "https://another.example", "WANDB_MODE": "online"}
