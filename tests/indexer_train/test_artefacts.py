"""`lookahead inspect` on everything that the toolkit writes, whole and damaged."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from data_gen.core.errors import InputError
from data_gen.core.rope import Rope
from eval.offline.evaluation import evaluate
from eval.report.tables import write_results
from indexer_train.artefacts import KINDS, inspect
from indexer_train.checkpoints import damage
from indexer_train.data.hard_negatives import mine
from indexer_train.formats.bundle import export_bundle, load_bundle
from indexer_train.formats.flashmemory import write_checkpoint
from indexer_train.formats.weights import LayerWeights
from indexer_train.load import load_indexer
from indexer_train.model import MemoryIndexer
from indexer_train.training.trainer import train


def quietly(items, what):
    return items


@pytest.fixture(scope="module")
def run(stores, tiny_recipe, tmp_path_factory):
    """A training run's folder with a bundle beside it."""
    out = tmp_path_factory.mktemp("run")
    export_bundle(train(stores[0], tiny_recipe.indexer, tiny_recipe.train, out), out / "bundle")
    return out


def facts(path):
    found = inspect(path, quietly)
    assert not found.damage, found.damage
    return found.kind, dict(found.facts)


def test_a_trace_store_is_counted(stores):
    kind, found = facts(stores[0].root)
    assert kind == "trace store" and found["documents"] == "8 whole, 0 damaged: single 4, text 4"
    assert found["layers"].startswith("[0, 2], hidden 32") and "llama" in found["backbone"]
    kind, found = facts(stores[0].paths()[0])
    assert kind == "document of a trace store" and found["documents"].startswith("1 whole")
    assert facts(stores[0].root / "manifest.json") == facts(stores[0].root)


def test_every_damaged_shard_is_named(stores, run, tiny_recipe, tmp_path):
    root = tmp_path / "store"
    shutil.copytree(stores[0].root, root)
    first, second = sorted(root.glob("*/doc_*"))[1:3]
    first.write_bytes(first.read_bytes()[:-9])
    flipped = bytearray(second.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    second.write_bytes(flipped)
    (root / ".unfinished-x.safetensors").write_bytes(b"")
    found = inspect(root, quietly)
    assert [name for name in (first.name, second.name) if any(name in line for line in found.damage)]
    assert len(found.damage) == 2 and dict(found.facts)["documents"].startswith("6 whole, 2 damaged")
    assert "left behind" in dict(found.facts)


def test_hard_negatives_belong_to_their_store(stores, run, tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    from data_gen.traces.store import TraceStore

    shutil.copytree(stores[0].root, tmp_path / "store")
    store = TraceStore.open(tmp_path / "store")
    mine(load_indexer(run / "indexer"), store, 0.05, 4, quietly)
    assert '"count": 4' in facts(store.root)[1]["hard negatives"]
    kind, found = facts(store.root / "hard_negatives")
    assert kind == "hard negatives" and found["documents"].startswith("8 in") and '"count": 4' in found["mined by"]
    first, second = sorted((store.root / "hard_negatives").glob("*/*"))[:2]
    with monkeypatch.context() as inside:
        inside.chdir(store.root / "hard_negatives")
        assert facts(Path(".")) == (kind, found) and facts(Path("0000", first.name))[0] == kind
    kind, found = facts(second)
    assert kind == "hard negatives" and found["documents"].startswith("1 in") and '"count": 4' in found["mined by"]
    first.write_bytes(b"short")
    for path in (store.root, store.root / "hard_negatives", first):
        assert f"{first}: damaged hard negatives" in inspect(path, quietly).damage[0]
    assert not inspect(second, quietly).damage


def test_the_folder_of_both_stores_and_results(stores, tmp_path):
    kind, found = facts(stores[0].root.parent)
    assert kind == "trace stores" and found["train: documents"].startswith("8 whole")
    assert found["heldout: documents"].startswith("4 whole")
    shutil.copytree(stores[0].root.parent, tmp_path / "traces")
    stray = tmp_path / "traces" / "train" / "0000" / "doc_0000003 (copy).safetensors"
    stray.write_bytes(b"")
    (tmp_path / "traces" / "heldout" / "manifest.json").unlink()
    gone, foreign = inspect(tmp_path / "traces", quietly).damage
    assert f"{tmp_path / 'traces' / 'heldout'}: no trace store there" in gone and str(stray) in foreign


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    assert str(tmp_path / "results.json") in inspect(tmp_path, quietly).damage[0]


def test_results_of_one_indexer_are_counted(run, stores, tmp_path):
    """It has no comparison, and sections that are no lists of rows have no count."""
    results = write_results(tmp_path, **evaluate({"indexer": load_indexer(run / "indexer")}, stores[1], 0.05, 0.1))
    for path in (tmp_path, tmp_path / "results.json"):
        kind, found = facts(path)
        assert kind == "results" and found["recall"] == f"{len(results.recall)} rows"
        assert set(found) == {"recall", "by_length", "by_depth", "heat", "documents", "reliability"}
    (tmp_path / "results.json").write_text('{"comparison": null, "recall": []}')
    assert facts(tmp_path) == ("results", {"recall": "0 rows"})


@pytest.mark.parametrize("name", ["indexer", "bundle"])
def test_an_indexer_and_its_bundle_say_the_same(run, name):
    kind, found = facts(run / name)
    assert kind == name and found["layers"] == "[0, 2], joined by sum" and found["shape"].startswith("4 heads, rank 8")
    if name == "bundle":
        assert facts(run / name / "bundle.json") == (kind, found)
    assert found["trained on"] == "6 documents traced from llama, labels: attention"
    assert found["served"] == "the best 10.0% of the chunks" and "mass_recall" in found["validation"]


def test_every_file_is_part_of_its_artefact(run, monkeypatch):
    (run / "indexer" / "calibration.json").write_text("{}")
    (run / "report.html").write_text("")
    checkpoint = str(next((run / "checkpoints").glob("checkpoint-*")).relative_to(run))
    for file, role in {
        "bundle/indexer.safetensors": "bundle: weights",
        "indexer/query_0_QueryEncoder/model.safetensors": "indexer: weights",
        "indexer/query_0_QueryEncoder/spec.json": "indexer: spec",
        "indexer/README.md": "indexer: model card",
        "indexer/calibration.json": "indexer: calibration.json",
        f"{checkpoint}/query_0_QueryEncoder/model.safetensors": "training checkpoint: weights",
        f"{checkpoint}/loss.safetensors": "training checkpoint: what the loss learned",
        f"{checkpoint}/optimizer.pt": "training checkpoint: state of the optimizer",
        f"{checkpoint}/scheduler.pt": "training checkpoint: state of the learning rate",
        f"{checkpoint}/rng_state.pth": "training checkpoint: rng_state.pth",
        "report.html": "training run: report.html",
    }.items():
        owner = run / (checkpoint if file.startswith(checkpoint) else file.split("/")[0] if "/" in file else ".")
        kind, found = facts(run / file)
        assert kind == role and found == facts(owner)[1]
    monkeypatch.chdir(run / "indexer" / "query_0_QueryEncoder")
    assert facts(Path("model.safetensors"))[0] == "indexer: weights"
    for made in ("indexer/calibration.json", "report.html"):
        (run / made).unlink()


def test_a_run_and_its_checkpoints(run, tmp_path):
    kind, found = facts(run)
    assert kind == "training run" and found["documents"] == 8 and found["indexer"] == "finished"
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"))
    assert {found[path.name] for path in checkpoints} == {"whole"}
    kind, found = facts(checkpoints[0])
    assert kind == "training checkpoint" and "of 24" in found["step"] and "at step" in found["best mass recall"]
    shutil.copytree(checkpoints[0], tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / "optimizer.pt").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "checkpoint-7"):
        assert "not whole (optimizer.pt is not the one that was written)" in inspect(path, quietly).damage[0]
    for step, (name, content) in enumerate(
        [("spec.json", "{}"), ("trainer_state.json", "[]"), ("trainer_state.json", "{}")], start=8
    ):
        shutil.copytree(checkpoints[0], tmp_path / f"checkpoint-{step}")
        next((tmp_path / f"checkpoint-{step}").rglob(name)).write_text(content)
        assert name in inspect(tmp_path / f"checkpoint-{step}", quietly).damage[0]
    (tmp_path / "checkpoint-old").mkdir()
    assert len(inspect(tmp_path, quietly).damage) == 4


@pytest.mark.parametrize("content", ["{", "{}"])
def test_damaged_settings_beside_a_checkpoint_are_reported(run, tmp_path, content):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "training.json").write_text(content)
    checkpoint = min((tmp_path / "checkpoints").glob("checkpoint-*"))
    found = inspect(checkpoint, quietly)
    (damage,) = found.damage
    assert damage.startswith(f"{tmp_path / 'training.json'}: damaged settings") and dict(found.facts)["step"]


def test_a_run_of_layers_one_by_one(run, tmp_path):
    for layer in (0, 2):
        shutil.copytree(run, tmp_path / f"layer-{layer}")
    shutil.copy(run / "training.json", tmp_path)
    _, found = facts(tmp_path)
    checkpoint = next((run / "checkpoints").glob("checkpoint-*")).name
    assert found["layer-2: indexer"] == "finished" and found[f"layer-0: {checkpoint}"] == "whole"
    (tmp_path / "layer-2" / "checkpoints" / checkpoint / "optimizer.pt").unlink()
    assert "layer-2" in inspect(tmp_path, quietly).damage[0]


def edit_spec(content, **changes):
    """A bundle's header with other settings in its spec, or in the shape of its indexer."""
    header = json.loads(content)
    for name, value in changes.items():
        (header["spec"]["shape"] if name in header["spec"]["shape"] else header["spec"])[name] = value
    return json.dumps(header).encode()


@pytest.mark.parametrize(
    ("file", "damage", "complaint"),
    [
        ("indexer/modules.json", lambda _: b"{", "indexer: damaged indexer"),
        ("indexer/query_0_QueryEncoder/spec.json", lambda _: b"{", "spec.json is not the one"),
        ("indexer/query_0_QueryEncoder/spec.json", lambda _: None, "spec.json is missing"),
        ("indexer/query_0_QueryEncoder/model.safetensors", lambda was: was[:-9], "model.safetensors is not the one"),
        ("bundle/bundle.json", lambda _: b"\xff\xfe", "bundle.json: damaged bundle"),
        ("bundle/bundle.json", lambda _: b"{}", "bundle.json: damaged bundle ('format' is missing)"),
        ("bundle/bundle.json", lambda _: b'{"format": 1}', "not a bundle of this version (format 1, not 2)"),
        ("bundle/bundle.json", lambda was: edit_spec(was, window=7), "damaged bundle (the checksum of"),
        ("bundle/bundle.json", lambda was: edit_spec(was, window=0), "spec.window: Input should be greater than 0"),
        ("bundle/bundle.json", lambda was: edit_spec(was, heads=8), "damaged bundle (the checksum of"),
        ("bundle/bundle.json", lambda was: edit_spec(was, layers=[0, 3]), "damaged bundle (the checksum of"),
        ("bundle/indexer.safetensors", lambda was: was[:-9], "damaged bundle (the checksum of"),
    ],
)
def test_damaged_indexers_and_bundles_are_refused_and_reported(run, tmp_path, file, damage, complaint):
    folder = tmp_path / file.split("/")[0]
    shutil.copytree(run / folder.name, folder)
    content = damage((tmp_path / file).read_bytes())
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(complaint)) as refused:
        (load_bundle if folder.name == "bundle" else load_indexer)(folder)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value) and "; " in str(refused.value)
    assert inspect(folder, quietly).damage == [str(refused.value)]


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["indexer", "bundle", "checkpoint"])
def test_one_flipped_byte_in_any_file_is_refused_and_reported(run, tmp_path, kind):
    origin = run / kind if kind != "checkpoint" else sorted((run / "checkpoints").glob("checkpoint-*"))[0]
    folder, random_places = tmp_path / origin.name, random.Random(0)
    shutil.copytree(origin, folder)
    assert not inspect(folder, quietly).damage
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        content = path.read_bytes()
        for place in [0, len(content) - 1, *(random_places.randrange(len(content)) for _ in range(6))]:
            if kind == "bundle" and path.suffix == ".json" and content[place : place + 1].isspace():
                continue  # white space of a header says nothing
            flip(path, place, place % 5)
            if path.name == "trainer_state.json" and place == 0:
                assert damage(folder) is not None
            assert inspect(folder, quietly).damage, f"{path.name}: byte {place}"
            if kind == "checkpoint":
                assert damage(folder) == f"{path.relative_to(folder)} is not the one that was written"
            else:
                with pytest.raises(InputError, match=f"damaged {kind}|not a bundle of this version"):
                    (load_bundle if kind == "bundle" else load_indexer)(folder)
            path.write_bytes(content)
        if path.name not in KINDS:  # what a folder is known by
            path.unlink()
            assert inspect(folder, quietly).damage, f"{path.name}: gone"
            path.write_bytes(content)
    assert not inspect(folder, quietly).damage


def test_a_pickled_file_is_no_substitute_for_weights(run, tmp_path):
    folder = shutil.copytree(run / "indexer", tmp_path / "indexer")
    encoder = load_indexer(folder).query_encoder
    weights = folder / "query_0_QueryEncoder" / "model.safetensors"
    weights.unlink()
    torch.save(encoder.state_dict(), weights.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_indexer(folder)
    with pytest.raises(InputError, match=r"model\.safetensors: damaged indexer"):
        MemoryIndexer(str(folder))


@pytest.mark.parametrize("content", ["{", "{}"])
def test_damaged_settings_of_a_run_are_reported(tmp_path, content):
    (tmp_path / "training.json").write_text(content)
    (damage,) = inspect(tmp_path, quietly).damage
    assert damage.startswith(f"{tmp_path / 'training.json'}: damaged ")


@pytest.mark.parametrize("format", ["flashmemory-joint", "flashmemory-safetensors"])
def test_checkpoints_of_the_release(tmp_path, format):
    weights = {
        layer: LayerWeights(torch.randn(8, 32), torch.ones(8), torch.randn(4 * 16, 8), torch.randn(4, 32))
        for layer in (10, 12)
    }
    path = tmp_path / ("served.pt" if format.endswith("joint") else "served.safetensors")
    write_checkpoint(weights, Rope(dims=8, theta=1e4, positions=64), path, format)
    kind, found = facts(path)
    assert kind == "checkpoint of the FlashMemory release"
    assert found["layer 12"] == "4 heads, rank 8, hidden 32, key width 16"
    assert found["RoPE"] == ("table for positions below 64" if format.endswith("joint") else "no table")


def test_a_folder_of_the_releases_layers(tmp_path):
    weights = LayerWeights(torch.randn(8, 32), torch.ones(8), torch.randn(4 * 16, 8), torch.randn(4, 32))
    rope = Rope(dims=8, theta=1e4, positions=64)
    write_checkpoint({10: weights, 12: weights}, rope, tmp_path, "flashmemory-layers")
    kind, found = facts(tmp_path)
    assert "release" in kind and found["ckpt_l12.pt: layer 12"] == "4 heads, rank 8, hidden 32, key width 16"
    (tmp_path / "ckpt_l10.pt").write_bytes(b"PK")
    assert len(inspect(tmp_path, quietly).damage) == 1


def test_weights_that_are_no_numbers_are_damage(run, tmp_path, stores):
    indexer = load_indexer(run / "indexer")
    torch.nn.init.constant_(indexer.query_encoder.encoders["2"].weights_proj.weight, torch.nan)
    indexer.save_pretrained(str(tmp_path / "indexer"))
    assert "encoders.2.weights_proj.weight" in inspect(tmp_path / "indexer", quietly).damage[0]


def test_anything_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    for path, complaint in ((tmp_path, "neither"), (tmp_path / "letter.txt", "neither"), (tmp_path / "x", "no such")):
        with pytest.raises(InputError, match=complaint):
            inspect(path, quietly)
