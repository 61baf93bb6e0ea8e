"""Batches made in tensor operations against those of the host: the same labels, the same law of what is drawn."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from indexer_train.config import CandidatesConfig, TrainConfig
from indexer_train.data.batches import AllCandidates, SampledCandidates
from indexer_train.data.device import DeviceCollator, lowest, shuffled
from indexer_train.losses import LOSSES
from indexer_train.model import MemoryIndexer
from tests.indexer_train.data.test_sampling import rows_of, spec_of, votes_store
from tests.second_device import GPU, MixedDevicesError, SecondDevice, there

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    return votes_store(tmp_path_factory.mktemp("votes") / "a")


@pytest.fixture(params=["voted", "planted"])
def traced(request):
    """A store of either oracle, and what makes a chunk golden there."""
    if request.param == "voted":
        return request.getfixturevalue("voted"), 3
    return request.getfixturevalue("planted")[0], 0.05


def on_device(store, golden, seed=0, device=CPU, **settings):
    return DeviceCollator(store, store.manifest.trace.layers, golden, CandidatesConfig(**settings), seed, device)


def spread(batch, chunks):
    """Labels of sampled candidates at their chunks, [B, 5, N] beside where there is any, [B, N]."""
    candidates = batch["document_chunks"][batch["query_candidates"]]
    there = batch["label"][:, 2].bool()
    assert all(len(set(row[real].tolist())) == int(real.sum()) for row, real in zip(candidates, there, strict=True))
    found, seen = torch.zeros(len(candidates), 5, chunks), torch.zeros(len(candidates), chunks, dtype=torch.bool)
    for row, real in enumerate(there):
        found[row][:, candidates[row, real]] = batch["label"][row][:, real]
        seen[row, candidates[row, real]] = True
    return found, seen


def test_all_candidates_are_the_hosts(traced):
    store, golden = traced
    settings = CandidatesConfig(common_weight=0.5)
    rows = rows_of(store, document=1, count=40)
    host = AllCandidates(store, store.manifest.trace.layers, golden, settings)(rows)
    device = on_device(store, golden, common_weight=0.5)(rows)
    assert device.keys() == host.keys()
    torch.testing.assert_close(device["label"], host["label"], rtol=0, atol=2e-6)
    assert torch.equal(device["label"][:, [1, 2, 4]], host["label"][:, [1, 2, 4]])
    for name in ("query_input_features", "query_positions", "document_input_values"):
        assert torch.equal(device[name], host[name])
    assert device["query_most_golden"] == host["query_most_golden"]


@pytest.mark.parametrize("few", [{}, {"positives": 2}, {"source": "in_batch"}, {"negatives": 1}])
def test_sampled_candidates_have_the_hosts_positives_and_labels(traced, few):
    store, golden = traced
    settings = CandidatesConfig(kind="sampled", common_weight=0.5, **few)
    rows = rows_of(store, document=1)
    batch = SampledCandidates(store, store.manifest.trace.layers, golden, settings, 0)(rows)
    made = on_device(store, golden, **settings.model_dump())(rows)
    chunks = store.document(store.paths()[1]).chunks
    (expected, drawn), (found, taken) = spread(batch, chunks), spread(made, chunks)
    assert made["query_most_golden"] == batch["query_most_golden"]
    assert torch.equal(taken.sum(dim=1), drawn.sum(dim=1))  # as many of each
    positive = expected[:, 1] >= golden
    assert torch.equal((found[:, 1] >= golden).sum(dim=1), positive.sum(dim=1))
    if "positives" not in few:
        assert torch.equal(found[:, 1] >= golden, positive)
    both = taken & drawn  # mass, peak and weight of whatever was drawn by either
    for column, close in ((0, 2e-6), (1, 0), (4, 0)):
        torch.testing.assert_close(found[:, column][both], expected[:, column][both], rtol=0, atol=close)
    torch.testing.assert_close(made["label"][:, 3, 0], batch["label"][:, 3, 0], rtol=0, atol=2e-6)
    keys = store.document(store.paths()[1]).keys(0)
    assert torch.equal(made["document_input_values"][:, 0], keys[made["document_chunks"]])


def test_drawn_chunks_of_the_batch_come_before_uniform_ones(voted):
    rows = rows_of(voted, document=1)
    _, taken = spread(on_device(voted, 3, kind="sampled", source="in_batch", negatives=2)(rows), 64)
    labels = AllCandidates(voted, [0, 1], 3, CandidatesConfig())(rows)["label"]
    golden, candidate = (labels[:, 1] >= 3) & labels[:, 2].bool(), labels[:, 2].bool()
    for row, mine in enumerate(golden):
        offered = golden.any(dim=0) & candidate[row] & ~mine
        others = taken[row] & ~mine
        assert int((others & offered).sum()) == min(int(others.sum()), int(offered.sum()))


def test_what_is_drawn_is_a_function_of_seed_epoch_document_and_token(voted):
    rows = rows_of(voted, document=1)
    first, again = on_device(voted, 3, kind="sampled"), on_device(voted, 3, kind="sampled")
    batch = first(rows)
    for name, value in again(rows).items():
        assert torch.equal(value, batch[name]) if isinstance(value, torch.Tensor) else value == batch[name]
    _, taken = spread(batch, 64)
    _, alone = spread(first(rows[3:5]), 64)  # whatever else is in the batch
    assert torch.equal(alone, taken[3:5])
    again.epoch = 1
    _, later = spread(again(rows), 64)
    _, other = spread(on_device(voted, 3, seed=1, kind="sampled")(rows), 64)
    assert not torch.equal(later, taken) and not torch.equal(other, taken)


def test_every_allowed_chunk_is_as_likely():
    rows, chunks, draws = torch.arange(4000), 20, 3
    allowed = torch.ones(4000, chunks, dtype=torch.bool)
    allowed[:, :5] = False
    chosen, there = lowest(shuffled(7, rows, chunks), allowed, torch.full((4000,), draws), draws)
    assert bool(there.all())
    counts = np.bincount(chosen.flatten().numpy(), minlength=chunks)
    expected = 4000 * draws / 15
    assert counts[:5].sum() == 0 and (((counts[5:] - expected) ** 2) / expected).sum() < 40  # chi-squared, 14 degrees
    pairs = np.bincount((chosen[:, 0] * chunks + chosen[:, 1]).numpy(), minlength=chunks**2)
    assert pairs.max() < 2.5 * 4000 / (15 * 14)  # nor do two draws know of each other


def test_fewer_allowed_than_wanted():
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    chosen, there = lowest(shuffled(0, torch.arange(2), 3), allowed, torch.tensor([3, 2]), 5)
    assert sorted(chosen[0][there[0]].tolist()) == [0, 2] and there.tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_takes_such_batches(voted, name):
    indexer = MemoryIndexer.from_spec(spec_of(voted), device="cpu")
    loss = LOSSES[name](indexer, 3.0)
    for kind in ("all", "sampled"):
        batch = on_device(voted, 3, kind=kind)(rows_of(voted))
        query = {key[6:]: value for key, value in batch.items() if key.startswith("query_")}
        document = {key[9:]: value for key, value in batch.items() if key.startswith("document_")}
        value = loss([query, document], batch["label"])
        value.backward()
        assert bool(value.isfinite()) and value.item() > 0


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValidationError, match="hard negatives are drawn on the host"):
        TrainConfig(epochs=1, batches="device", candidates=CandidatesConfig(kind="sampled", source="hard"))
    with pytest.raises(ValidationError, match="only with `batches: host`"):
        TrainConfig(epochs=1, batches="device", workers=2)


@pytest.mark.parametrize("kind", ["all", "sampled"])
def test_a_batch_is_made_on_the_device_alone(traced, kind):
    store, golden = traced
    rows = rows_of(store, document=1)
    here = on_device(store, golden, kind=kind)(rows)
    with SecondDevice():
        made = on_device(store, golden, device=GPU, kind=kind)(rows)
        assert all(there(value) for value in made.values() if isinstance(value, torch.Tensor))
        with pytest.raises(MixedDevicesError):
            made["label"] + here["label"]
    for name, value in here.items():
        assert torch.equal(made[name], value) if isinstance(value, torch.Tensor) else made[name] == value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["all", "sampled"])
def test_a_gpu_makes_the_cpus_batches(planted, kind):
    store = planted[0]
    rows = rows_of(store, document=1)
    made, here = (on_device(store, 0.05, device=torch.device(name), kind=kind)(rows) for name in ("cuda", "cpu"))
    for name, value in here.items():
        assert torch.equal(made[name].cpu(), value) if isinstance(value, torch.Tensor) else made[name] == value
