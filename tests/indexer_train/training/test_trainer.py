"""Training end to end on traces of a tiny model: learning, exact resume, no backbone."""

import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.rope import Rope
from data_gen.traces.labels import SparseOracle
from data_gen.traces.store import TraceDocument, TraceStore
from eval.offline.evaluation import threshold_for
from indexer_train.config import CandidatesConfig, IndexerConfig
from indexer_train.data.batches import AllCandidates, DocumentBatchSampler, window_index
from indexer_train.data.sampling import any_golden
from indexer_train.load import check_traces, load_indexer
from indexer_train.losses import LOSSES
from indexer_train.measure.metrics import DocumentScorer, served_windows
from indexer_train.model import MemoryIndexer
from indexer_train.training import trainer as trainer_module
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train
from tests.indexer_train.training.trainers import make_trainer


def weights(indexer):
    return {name: value.clone() for name, value in indexer.state_dict().items()}


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("step", "kind", "workers", "batches"),
    [(3, "all", 0, "host"), (8, "sampled", 2, "host"), (13, "sampled", 0, "host"), (13, "sampled", 0, "device")],
)
def test_a_killed_run_resumes_to_the_same_bits(
    stores, tiny_recipe, tmp_path, monkeypatch, step, kind, workers, batches
):
    changes = {"candidates": CandidatesConfig(kind=kind), "batches": batches}
    settings = tiny_recipe.train.model_copy(update=changes)
    whole = train(stores[0], tiny_recipe.indexer, settings, tmp_path / "whole")
    settings = settings.model_copy(update={"workers": workers})
    stock = trainer_module.IndexerTrainer

    def killed(*args, callbacks, **kwargs):
        return stock(*args, callbacks=[*callbacks, KillAt(step)], **kwargs)

    monkeypatch.setattr(trainer_module, "IndexerTrainer", killed)
    with pytest.raises(KeyboardInterrupt):
        train(stores[0], tiny_recipe.indexer, settings, tmp_path / "killed")
    monkeypatch.setattr(trainer_module, "IndexerTrainer", stock)
    half_written = tmp_path / "killed" / "checkpoints" / "checkpoint-999"
    half_written.mkdir(parents=True)
    resumed = train(stores[0], tiny_recipe.indexer, settings, tmp_path / "killed")
    assert not half_written.exists()
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert resumed.spec == whole.spec


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_finds_the_planted_chunks(planted, tiny_recipe, tmp_path, loss):
    settings = tiny_recipe.train.model_copy(
        update={"loss": loss, "epochs": 8, "learning_rate": 3e-3, "windows_per_document": 32}
    )
    indexer = train(planted[0], IndexerConfig(heads=16, rank=32), settings, tmp_path)
    torch.manual_seed(1)
    untrained = type(indexer).from_spec(indexer.spec, device="cpu")
    evaluator = MassRecallEvaluator(planted[1], settings.budget)
    assert evaluator(untrained)["mass_recall"] < 0.3
    assert evaluator(indexer)["mass_recall"] > 0.85


def test_layers_trained_one_by_one_make_one_indexer(planted, tiny_recipe, tmp_path):
    settings = tiny_recipe.train.model_copy(
        update={"epochs": 8, "learning_rate": 3e-3, "windows_per_document": 32, "one_by_one": True}
    )
    shape = IndexerConfig(heads=16, rank=32)
    indexer = train(planted[0], shape, settings, tmp_path)
    assert indexer.spec.layers == [0, 1] and indexer.spec.provenance.metrics
    assert MassRecallEvaluator(planted[1], settings.budget)(indexer)["mass_recall"] > 0.85
    for layer in (0, 1):
        part = load_indexer(tmp_path / f"layer-{layer}" / "indexer")
        assert part.spec.layers == [layer]
        for name, value in part.query_encoder.encoders[str(layer)].state_dict().items():
            assert torch.equal(indexer.query_encoder.encoders[str(layer)].state_dict()[name], value)
    again = train(planted[0], shape, settings, tmp_path)
    assert again.spec == indexer.spec
    with pytest.raises(InputError, match="all layers together"):
        train(planted[0], shape.model_copy(update={"bias": True}), settings, tmp_path / "b")


def test_the_saved_indexer_is_the_best_checkpoint_and_calibrated(stores, tiny_recipe, tmp_path):
    indexer = train(stores[0], tiny_recipe.indexer, tiny_recipe.train, tmp_path)
    saved = load_indexer(tmp_path / "indexer")
    assert saved.spec == indexer.spec
    _, validation = stores[0].hold_back(tiny_recipe.train.validation_every)
    threshold, note = threshold_for("indexer", saved, 0.1)
    assert note is None
    shares = []
    for served in served_windows(validation):
        scores = DocumentScorer(saved, served.document).joined_scores(served)
        chosen = (scores >= threshold.cuts[0].score) & served.labels.candidate
        shares.append(float((chosen.sum(dim=1) / served.visible).mean()))
    assert 0.09 < sum(shares) / len(shares) <= 0.1


def test_no_oracle_of_a_held_back_document_stays_in_memory(stores, monkeypatch):
    made, unpack = [], SparseOracle.of

    def counted(*of):
        oracle = unpack(*of)
        made.append(weakref.ref(oracle))
        return oracle

    documents, forget = [], TraceDocument.forget_oracle

    def forgotten(self):
        forget(self)
        documents.append(self)

    monkeypatch.setattr(SparseOracle, "of", counted)
    monkeypatch.setattr(TraceDocument, "forget_oracle", forgotten)
    evaluator = MassRecallEvaluator(stores[1], 0.1)
    assert len(made) == len(evaluator.served) == 4 and all(oracle() is None for oracle in made)
    kept = {"oracle", "_oracle_on", "attention", "golden"}
    assert len(documents) == 4 and not any(kept & vars(document).keys() for document in documents)


def test_the_index_is_not_hashed(planted, monkeypatch):
    """Which pickles all of it: it has a row for every window of the store."""
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", None)
    assert len(window_index(planted[0])) == 48 * 31


def test_batches_hold_one_document_and_depend_on_seed_and_epoch(stores, tiny_recipe):
    index = window_index(stores[0])
    sampler = DocumentBatchSampler(index, batch_size=16, seed=5)
    first = list(sampler)
    assert first == list(sampler)
    assert len(first) == len(sampler) == 8
    assert all(len({index[row]["document"] for row in batch}) == 1 for batch in first)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(DocumentBatchSampler(index, batch_size=16, seed=6)) != first
    collator = AllCandidates(stores[0], tiny_recipe.trace.layers, 0.05, CandidatesConfig())
    batch = collator([index[row] for row in first[0]])
    mass, peak, candidate, protected, _ = batch["label"].unbind(1)
    assert torch.all(peak[candidate == 0] == 0)
    document = stores[0].paths()[index[first[0][0]]["document"]]
    labels = next(d for d in stores[0] if d.path == document).labels(
        torch.tensor([[index[row]["first"], index[row]["last"]] for row in first[0]])
    )
    torch.testing.assert_close(mass, labels.mass)
    torch.testing.assert_close(protected[:, 0] + mass.sum(1) + labels.rest, torch.ones(len(mass)))


LOADED = """
auto = "transformers.models.auto.modeling_auto"  # names of classes, which the stock trainer looks up
loaded = [name for name in sys.modules if name.startswith("data_gen.backbones")]
loaded += [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
assert set(loaded) <= {auto}, loaded
"""
"""Run where training was; no model family's own code may be there."""


def test_no_backbone_is_ever_loaded(stores, tiny_recipe, tmp_path):
    """By the command line, which loads all that the packages of training and of bundles do."""
    recipe, traces, out = tmp_path / "recipe.yaml", str(stores[0].root), str(tmp_path / "out")
    recipe.write_text(tiny_recipe.model_dump_json())  # JSON is YAML
    script = f"""
import sys
import cli
import indexer_train.formats.bundle
sys.argv = ["lookahead", "train", {str(recipe)!r}, "--traces", {traces!r}, "--out", {out!r}]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    subprocess.run([sys.executable, "-c", script + LOADED], check=True)
    assert (tmp_path / "out" / "indexer").exists()


def test_a_run_is_of_the_documents_it_began_with(stores, tiny_recipe, tmp_path):
    store = TraceStore.open(shutil.copytree(stores[0].root, tmp_path / "store"))
    train(store, tiny_recipe.indexer, tiny_recipe.train, tmp_path / "run")
    one, other = store.paths()[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(InputError, match=r"doc_0000000.*it holds train-text-0000001 .*, not train-text-0000000"):
        train(store, tiny_recipe.indexer, tiny_recipe.train, tmp_path / "run")
    other.write_bytes(one.read_bytes())
    one.write_bytes(content)
    fewer = store.only(store.paths()[1:])
    with pytest.raises(InputError, match="other settings or traces"):
        train(fewer, tiny_recipe.indexer, tiny_recipe.train, tmp_path / "run")


def test_what_does_not_belong_together_is_refused(stores, tiny_recipe, tmp_path):
    train(stores[0], tiny_recipe.indexer, tiny_recipe.train, tmp_path)
    with pytest.raises(InputError, match="other settings or traces"):
        train(stores[1], tiny_recipe.indexer, tiny_recipe.train, tmp_path)
    (tmp_path / "training.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match=r"training\.json is missing"):
        train(stores[1], tiny_recipe.indexer, tiny_recipe.train, tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "training.json")
    rare = tiny_recipe.train.model_copy(update={"candidates": CandidatesConfig(common_weight=0.5)})
    with pytest.raises(InputError, match="listwise_mass weighs no single chunk"):
        train(stores[0], tiny_recipe.indexer, rare, tmp_path / "b")
    for field, value, complaint in (
        ("golden", 2, "train.golden 2: the oracle `attention` gives 1 at most"),
        ("warmup", 24, r"train.warmup 24: the whole run is only 24 steps long"),
    ):
        with pytest.raises(InputError, match=complaint):
            train(stores[0], tiny_recipe.indexer, tiny_recipe.train.model_copy(update={field: value}), tmp_path / "b")
    with pytest.raises(InputError, match="unknown loss"):
        train(stores[0], tiny_recipe.indexer, tiny_recipe.train.model_copy(update={"loss": "x"}), tmp_path / "b")
    with pytest.raises(InputError, match="no indexer there"):
        load_indexer(tmp_path / "nothing")


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_loss_that_needs_golden_chunks_is_refused_where_there_are_none(planted, tiny_recipe, tmp_path, loss):
    """Every planted chunk has a probability of .9."""
    settings = tiny_recipe.train.model_copy(update={"loss": loss, "golden": 0.95})
    if loss in ("listwise_mass", "listwise_peak"):
        make_trainer(planted[0], tiny_recipe.indexer, settings, tmp_path)
        return
    with pytest.raises(InputError, match=rf"no training window has a golden chunk \(at least 0.95\), so {loss} would"):
        make_trainer(planted[0], tiny_recipe.indexer, settings, tmp_path)
    make_trainer(planted[0], tiny_recipe.indexer, settings.model_copy(update={"golden": 0.85}), tmp_path)


def test_windows_that_do_not_train_do_not_count_as_golden(planted):
    index = window_index(planted[0])
    assert any_golden(planted[0], index, 0.85)
    assert not any_golden(planted[0], index.select([]), 0.85)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_all_documents_held_back_are_none_to_train_on(stores, tiny_recipe, tmp_path, one_by_one):
    settings = tiny_recipe.train.model_copy(update={"validation_every": 1, "one_by_one": one_by_one})
    with pytest.raises(InputError, match="validation_every 1 leaves nothing to train on, of 8 doc"):
        train(stores[0], tiny_recipe.indexer, settings, tmp_path)


@pytest.mark.parametrize(
    ("section", "changes", "complaint"),
    [
        ("backbone", {"fingerprint": "other"}, "another backbone"),
        ("trace", {"layers": [0]}, r"reads layers \[2\]"),
        ("trace", {"chunking": Chunking(tokens=4, sink=1, recent=3)}, r"other chunks \(tokens=4 sink=1 recent=3\)"),
        ("trace", {"window": 8}, r"other windows \(8\) than the indexer's \(16\)"),
        ("backbone", {"hidden": 64}, r"other hidden width \(64\)"),
        ("backbone", {"key": "fp8_rope_hadamard"}, "other keys"),
        ("backbone", {"key_width": 7}, "other keys"),
        ("backbone", {"rope": Rope(dims=8, theta=1e4, positions=64)}, "other RoPE"),
    ],
)
def test_traces_of_something_else_are_refused(stores, tiny_recipe, section, changes, complaint):
    manifest = stores[1].manifest
    indexer = MemoryIndexer.from_spec(trainer_module._spec(stores[1], 0, tiny_recipe.indexer, tiny_recipe.train, None))
    check_traces(indexer, stores[1])
    changed = {"backbone": replace(manifest.backbone, **changes) if section == "backbone" else manifest.backbone}
    changed["trace"] = manifest.trace.model_copy(update=changes) if section == "trace" else manifest.trace
    with pytest.raises(InputError, match=complaint):
        check_traces(indexer, TraceStore(stores[1].root, manifest.model_copy(update=changed)))


def test_a_rope_that_ends_elsewhere_turns_the_same(pocket_traces, pocket_indexer):
    rope = pocket_indexer.spec.rope
    shorter = pocket_indexer.spec.model_copy(update={"rope": rope.model_copy(update={"positions": 1024})})
    check_traces(MemoryIndexer.from_spec(shorter, device="cpu"), pocket_traces)
