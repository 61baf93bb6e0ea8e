"""Mined negatives against a search of every chunk, and training that uses them."""

import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_gen.core.errors import InputError
from data_gen.core.files import save_tensors
from data_gen.core.keys import key_vectors
from data_gen.traces.store import TraceStore
from indexer_train.config import CandidatesConfig, IndexerConfig
from indexer_train.data.batches import AllCandidates, SampledCandidates, window_index
from indexer_train.data.hard_negatives import HardNegatives, mine, mine_document
from indexer_train.load import spec_for
from indexer_train.model import MemoryIndexer
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train

pytest.importorskip("faiss")
GOLDEN = 0.05


def quietly(items, what):
    return items


@pytest.fixture(scope="module")
def store(stores, tmp_path_factory):
    """A store to write beside."""
    root = tmp_path_factory.mktemp("mined") / "store"
    shutil.copytree(stores[0].root, root)
    return TraceStore.open(root)


@pytest.fixture(scope="module")
def indexer(store):
    torch.manual_seed(0)
    spec = spec_for(store.manifest, IndexerConfig(heads=4, rank=8, join="max"))
    return MemoryIndexer.from_spec(spec, device="cpu")


def allowed(store, indexer, number):
    """Of every window of a document: (row, [N] bool chunks that may be mined, [N] scores that serving ranks by)."""
    document = list(store)[number]
    windows = document.windows(serving=False)
    rows = [{"document": number, "first": first, "last": last} for first, last in windows.tolist()]
    label = AllCandidates(store, indexer.spec.layers, GOLDEN, CandidatesConfig())(rows)["label"]
    negative = label[:, 2].bool() & (label[:, 1] < GOLDEN)
    starts = windows[:, 0]
    hidden = torch.stack([document.hidden(layer)[starts] for layer in indexer.spec.layers], dim=1)
    keys = torch.stack([document.keys(layer) for layer in indexer.spec.layers], dim=1)
    return document, starts, negative, indexer.joined_scores(hidden, keys, document.positions[starts])


def test_all_that_may_be_mined_comes_hardest_first(store, indexer):
    document, rows, negative, scores = allowed(store, indexer, 0)
    found = mine_document(indexer, document, GOLDEN, document.chunks)
    for row, may, score in zip(rows.tolist(), negative, scores, strict=True):
        mined = found[row][found[row] >= 0].long()
        assert sorted(mined.tolist()) == may.nonzero().flatten().tolist()
        assert (score[mined].diff() <= 1e-5).all()
    others = torch.ones(len(found), dtype=torch.bool)
    others[rows] = False
    assert (found[others] == -1).all()
    assert torch.equal(mine_document(indexer, document, GOLDEN, 10**9), found)  # none are more than all


def test_the_few_mined_are_the_best_of_the_surrogate_by_their_exact_score(store, indexer):
    document, rows, negative, scores = allowed(store, indexer, 1)
    count = 3
    found = mine_document(indexer, document, GOLDEN, count)[rows].long()
    assert (found >= 0).all() and negative.gather(1, found).all()
    hidden = torch.stack([document.hidden(layer)[rows] for layer in indexer.spec.layers], dim=1)
    features = {"input_features": hidden, "positions": document.positions[rows]}
    queries = indexer.query_encoder(features)["sentence_embedding"].detach()
    keys = key_vectors(torch.stack([document.keys(layer) for layer in indexer.spec.layers], dim=1)).flatten(1)
    nearest = (indexer.surrogate(queries) @ keys.T).masked_fill(~negative, -torch.inf).topk(4 * count).indices
    best = scores.masked_fill(~negative, -torch.inf).gather(1, nearest).topk(count).values
    torch.testing.assert_close(scores.gather(1, found), best, atol=1e-5, rtol=1e-5)
    chance = scores.masked_fill(~negative, 0).sum(dim=1) / negative.sum(dim=1)
    assert float((best.mean(dim=1) > chance).float().mean()) > 0.9


def test_the_sidecar_is_kept_and_the_trainer_draws_from_it(store, indexer, tiny_recipe, tmp_path):
    settings = CandidatesConfig(kind="sampled", source="hard", negatives=1)
    with pytest.raises(InputError, match="run `lookahead mine`"):
        HardNegatives.beside(store)
    mine(indexer, store, GOLDEN, 200, quietly)
    sidecars = sorted((store.root / "hard_negatives").glob("*/*"))
    stamps = [path.stat().st_mtime_ns for path in sidecars]
    mine(indexer, store, GOLDEN, 200, quietly)
    assert [path.stat().st_mtime_ns for path in sidecars] == stamps and len(sidecars) == len(store.paths())
    content = sidecars[3].read_bytes()
    sidecars[3].write_bytes(content[:-9])
    with pytest.raises(InputError, match=f"{sidecars[3].name}: damaged hard negatives .*; mine again"):
        HardNegatives.beside(store)
    mine(indexer, store, GOLDEN, 200, quietly)
    assert sidecars[3].read_bytes() == content
    assert [path.stat().st_mtime_ns for path in sidecars[:3]] == stamps[:3]
    rows = [row for row in window_index(store) if row["document"] == 2][-9:]
    batch = SampledCandidates(store, indexer.spec.layers, GOLDEN, settings, seed=0)(rows)
    hard, document = HardNegatives.beside(store), list(store)[2]
    mined = hard.of(document, torch.tensor([row["first"] for row in rows]))
    for place, own in enumerate(mined):
        peak, mask = batch["label"][place, 1], batch["label"][place, 2].bool()
        chunks = batch["document_chunks"][batch["query_candidates"][place]]
        negatives = chunks[mask & (peak < GOLDEN)]
        assert len(negatives) and set(negatives.tolist()) <= set(own.tolist())
    trained = train(
        store,
        IndexerConfig(heads=4, rank=8),
        tiny_recipe.train.model_copy(update={"loss": "focal", "candidates": settings}),
        tmp_path,
    )
    assert 0 < MassRecallEvaluator(store, 0.1)(trained)["mass_recall"] < 1
    mine(indexer, store, GOLDEN, 4, quietly)
    with pytest.raises(InputError, match=r"doc_0000002\.safetensors: mined anew since training began"):
        hard.of(document, torch.tensor([0]))
    with pytest.raises(InputError, match="other settings or traces"):  # the same traces with other negatives
        train(
            store,
            IndexerConfig(heads=4, rank=8),
            tiny_recipe.train.model_copy(update={"loss": "focal", "candidates": settings}),
            tmp_path,
        )


def rewritten(sidecar, chunks):
    """The sidecar with other chunks and their checksum."""
    with safe_open(sidecar, framework="pt") as file:
        save_tensors({"chunks": chunks}, sidecar, file.metadata())


def foreign(sidecar, other):
    shutil.copy(other, sidecar)


def flipped(sidecar, _):
    content = bytearray(sidecar.read_bytes())
    content[-4] ^= 1
    sidecar.write_bytes(content)


def too_short(sidecar, _):
    rewritten(sidecar, load_file(sidecar)["chunks"][:-1].clone())


def too_far(sidecar, _):
    rewritten(sidecar, load_file(sidecar)["chunks"] + 1000)


def unsigned(sidecar, _):
    save_file(load_file(sidecar), sidecar, {"made_by": "an earlier version"})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (foreign, "of another document"),
        (flipped, "its bytes are not those that were written"),
        (too_short, r"chunks are torch.int32 \[\d+, 4\] beside \d+ rows"),
        (too_far, r"it names chunks \d+ to 1\d\d\d of \d+"),
        (unsigned, "its checksum is missing"),
    ],
)
def test_negatives_that_are_not_the_documents_are_refused_and_mined_again(
    stores, indexer, tiny_recipe, tmp_path, damage, complaint
):
    store = TraceStore.open(shutil.copytree(stores[0].root, tmp_path / "store"))
    mine(indexer, store, GOLDEN, 4, quietly)
    one, other = sorted((store.root / "hard_negatives").glob("*/*"))[1:3]
    content = one.read_bytes()
    damage(one, other)
    settings = {"loss": "focal", "candidates": CandidatesConfig(kind="sampled", source="hard")}
    with pytest.raises(InputError, match=rf"{one}: damaged hard negatives \({complaint}\); mine again"):
        train(store, tiny_recipe.indexer, tiny_recipe.train.model_copy(update=settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mine(indexer, store, GOLDEN, 4, quietly)
    assert one.read_bytes() == content


def test_another_way_to_join_layers_is_another_miner(stores, indexer, tmp_path):
    store = TraceStore.open(shutil.copytree(stores[0].root, tmp_path / "store"))
    mine(indexer, store, GOLDEN, 4, quietly)
    (maker,) = HardNegatives.beside(store).made_by
    spec = indexer.spec.model_copy(update={"shape": indexer.spec.shape.model_copy(update={"join": "sum"})})
    summing = MemoryIndexer.from_spec(spec, device="cpu")
    summing.load_state_dict(indexer.state_dict())
    mine(summing, store, GOLDEN, 4, quietly)
    (joined,) = HardNegatives.beside(store).made_by
    assert joined != maker


def test_without_faiss_the_message_says_what_to_install(store, indexer, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'lookahead-indexer\[cpu\]', or \[gpu\]"):
        mine(indexer, store, GOLDEN, 4, quietly)
