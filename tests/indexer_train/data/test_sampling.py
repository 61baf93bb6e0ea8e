"""Sampled candidates against brute force over all chunks."""

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils.data import DataLoader

from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.tensors import distinct, ranked
from data_gen.traces.labels import SparseOracle
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, GoldenChunks, Manifest, RawTrace, Span
from indexer_train.config import CandidatesConfig, IndexerConfig
from indexer_train.data import batches
from indexer_train.data.batches import AllCandidates, DocumentBatchSampler, SampledCandidates, window_index
from indexer_train.data.mixture import mix
from indexer_train.data.sampling import generator, uniform
from indexer_train.load import spec_for
from indexer_train.losses import LOSSES
from indexer_train.model import MemoryIndexer
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train


def votes_store(root, documents=2, rows=40, chunks=64, tokens=4):
    """Random votes of an indexer oracle; chunk 5 is golden for every token."""
    rng = torch.Generator().manual_seed(3)
    trace = TraceConfig(
        chunking=Chunking(tokens=tokens, sink=1, recent=2),
        layers=[0, 1],
        window=4,
        text_rows=rows,
        tail=2,
        oracle="indexer",
    )
    backbone = BackboneInfo("votes", "votes", [0, 1], 24, 16, 4 * chunks)
    plan = {number: (str(number), "") for number in range(documents)}
    store = TraceStore.create(root, Manifest(backbone=backbone, trace=trace, documents={}, plan=plan, versions={}))
    positions = torch.arange(4 * chunks - rows, 4 * chunks)
    for index in range(documents):
        votes = torch.where(torch.rand(rows, chunks, generator=rng) < 0.03, 4, 0)
        votes[torch.arange(chunks) >= ((positions + 1) // 4)[:, None]] = 0
        votes[:, 5] = 7
        raw = RawTrace(
            hidden={layer: torch.randn(rows, 24, generator=rng).bfloat16() for layer in range(2)},
            keys={layer: torch.randn(chunks, 16, generator=rng).half() for layer in range(2)},
            positions=positions,
            oracle=GoldenChunks.from_votes(votes, 3),
        )
        span = Span(first=0, last=rows, serve=0, tail=True)
        store.write(index, DocumentMeta(name=str(index), task="text", length=4 * chunks, spans=[span]), raw)
    return store


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    return votes_store(tmp_path_factory.mktemp("votes") / "a")


def spec_of(store, **shape):
    return spec_for(store.manifest, IndexerConfig(heads=4, rank=8, **shape))


def rows_of(store, document=0, count=12):
    return [row for row in window_index(store) if row["document"] == document][-count:]


DIGITS = st.sampled_from([0, 1, (1 << 16) - 1])
WIDE = st.builds(lambda *digits: sum(digit << 16 * place for place, digit in enumerate(digits)), DIGITS, DIGITS, DIGITS)


@given(st.lists(WIDE | st.integers(0, 1 << 40)))  # of three digits, often the same but for one of them
def test_sorting_by_digits_is_numpys_sort(numbers):
    values = np.array(numbers, np.int64)
    order, new = ranked(values)
    assert np.array_equal(order, np.argsort(values, kind="stable"))
    assert np.array_equal(values[order[new]], np.unique(values)) and len(new) == len(values)
    for ours, numpys in zip(distinct(values), np.unique(values, return_inverse=True), strict=True):
        assert np.array_equal(ours, numpys)


@given(st.data())
def test_uniform_negatives_are_distinct_inside_and_never_golden(data):
    first = data.draw(st.integers(0, 50))
    last = first + data.draw(st.integers(0, 400))
    size = data.draw(st.integers(0, last - first))
    seed = data.draw(st.integers(0, 1000))
    excluded = np.sort(np.random.default_rng(seed).choice(np.arange(first, last), size, replace=False))
    count = data.draw(st.integers(0, 300))
    drawn = uniform(generator(seed), (first, last), excluded, count)
    pool = set(range(first, last)) - set(excluded.tolist())
    assert len(set(drawn.tolist())) == len(drawn) == min(count, len(pool))
    assert set(drawn.tolist()) <= pool
    assert np.array_equal(drawn, uniform(generator(seed), (first, last), excluded, count))


@pytest.mark.parametrize("size", [20, 4000])  # the pool written down, and rejection sampling
def test_uniform_negatives_are_uniform(size):
    excluded = np.arange(0, size, 4)
    rng, counts = generator(1), np.zeros(size)
    draws = 400 * size // 5
    for _ in range(draws // 5):
        counts[uniform(rng, (0, size), excluded, 5)] += 1
    assert not counts[excluded].any()
    rest = np.delete(counts, excluded)
    expected = draws / len(rest)
    assert (((rest - expected) ** 2 / expected).sum() - len(rest)) / np.sqrt(2 * len(rest)) < 5  # chi-squared


def test_cost_does_not_grow_with_the_document():
    class Counting:
        def __init__(self):
            self.rng, self.asked = generator(0), 0

        def integers(self, first, last, count):
            self.asked += count
            return self.rng.integers(first, last, count)

    for chunks in (4096, 262_144, 1 << 40):
        counting = Counting()
        assert len(uniform(counting, (0, chunks), np.arange(80), 240)) == 240
        assert counting.asked <= 4 * 240


@pytest.mark.parametrize("which", ["attention", "indexer"])
def test_the_sparse_oracle_is_the_dense_one(which, stores, voted):
    for document in voted if which == "indexer" else stores[0]:
        windows = document.windows(serving=False)
        labels, oracle = document.labels(windows), document.oracle
        for row, (first, last) in enumerate(windows.tolist()):
            bounds = document.trace.chunking.candidates(int(document.positions[first]))
            window = oracle.window(first, last, bounds)
            everywhere = np.arange(document.chunks)
            table = np.zeros(document.chunks, np.int32)
            mass, peak = (torch.from_numpy(value).float() for value in window.at(everywhere, table))
            assert not table.any()
            assert torch.equal(mass, labels.mass[row]) and torch.equal(peak, labels.peak[row])
            protected = 1 - float(labels.mass[row].sum() + labels.rest[row])
            assert abs(window.protected_mass - protected) < 1e-5


@pytest.mark.parametrize("votes", [True, False])
def test_a_window_that_needed_nothing(votes):
    nothing = np.zeros(0, np.float32)
    oracle = SparseOracle(
        np.zeros(5, np.int64), np.zeros(0, np.int64), nothing, nothing, np.zeros(4, np.float32), votes, 9
    )
    window = oracle.window(1, 4, (1, 9))
    assert not len(window.chunks) and not len(window.mass) and window.protected_mass == 1


@pytest.mark.parametrize("source", ["uniform", "in_batch"])
def test_candidates_are_the_golden_chunks_and_three_negatives_each(voted, source):
    settings = CandidatesConfig(kind="sampled", source=source, common_weight=0.5)
    collator, rows = SampledCandidates(voted, [0, 1], 3, settings, seed=7), rows_of(voted)
    everything = AllCandidates(voted, [0, 1], 3, settings)(rows)
    batch = collator(rows)
    dense = everything["label"]
    golden = (dense[:, 1] >= 3) & (dense[:, 2] > 0)
    assert golden.any(dim=1).all() and golden[:, 5].all()
    others = golden.any(dim=0)
    drawn_elsewhere = 0
    for row in range(len(rows)):
        mask = batch["label"][row, 2].bool()
        chunks = batch["document_chunks"][batch["query_candidates"][row, mask]]
        assert len(chunks.unique()) == len(chunks)
        assert dense[row, 2, chunks].all()  # visible and unprotected
        positives = chunks[golden[row, chunks]]
        assert sorted(positives.tolist()) == golden[row].nonzero().flatten().tolist()
        assert len(chunks) == 4 * len(positives)
        for channel in (0, 1, 4):
            torch.testing.assert_close(batch["label"][row, channel, mask], dense[row, channel, chunks])
        torch.testing.assert_close(batch["label"][row, 3, 0], dense[row, 3, 0], atol=1e-5, rtol=0)
        negatives = chunks[~golden[row, chunks]]
        available = int((others & ~golden[row] & dense[row, 2].bool()).sum())
        if source == "in_batch":
            assert int(others[negatives].sum()) == min(available, len(negatives))
        drawn_elsewhere += int(others[negatives].sum())
    assert drawn_elsewhere
    keys = next(iter(voted)).keys(0)
    assert torch.equal(batch["document_input_values"][:, 0], keys[batch["document_chunks"]])


def test_what_is_drawn_depends_on_seed_epoch_document_and_tokens_alone(voted):
    settings = CandidatesConfig(kind="sampled")

    def drawn(seed=7, epoch=0, document=0, count=12):
        collator = SampledCandidates(voted, [0, 1], 3, settings, seed)
        collator.epoch = epoch
        batch = collator(rows_of(voted, document, count))
        return batch["document_chunks"][batch["query_candidates"]].tolist()

    first = drawn()
    assert first == drawn()
    for changed in ({"seed": 8}, {"epoch": 1}, {"document": 1}, {"count": 11}):
        assert drawn(**changed) != first


def test_batches_made_by_another_process_are_the_same(voted):
    """One that shares no memory but the epoch's, as every process does where none can be forked."""
    settings = CandidatesConfig(kind="sampled", common_weight=0.5)
    collator, index = SampledCandidates(voted, [0, 1], 3, settings, seed=7), window_index(voted)
    batches = [[3, 5, 8], [len(index) - 2, len(index) - 1]]
    rows = [[index[place] for place in batch] for batch in batches]
    collator(rows[0])  # now documents are open, which do not travel
    loader = DataLoader(
        index,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for collator.epoch in (0, 1):
        twin = pickle.loads(pickle.dumps(collator))
        for each, *others in zip(rows, loader, map(twin, rows), strict=True):
            expected = collator(each)
            for batch in others:
                assert batch.keys() == expected.keys()
                for name, value in expected.items():
                    assert torch.equal(batch[name], value) if torch.is_tensor(value) else batch[name] == value


def test_at_most_so_many_positives_and_windows_without_any(voted):
    collator = SampledCandidates(voted, [0, 1], 3, CandidatesConfig(kind="sampled", positives=2), seed=0)
    label = collator(rows_of(voted))["label"]
    assert ((label[:, 1] >= 3).sum(dim=1) == 2).all() and (label[:, 2].sum(dim=1) == 8).all()
    collator = SampledCandidates(voted, [0, 1], 100, CandidatesConfig(kind="sampled"), seed=0)  # nothing is golden
    label = collator(rows_of(voted))["label"]
    assert (label[:, 2].sum(dim=1) == 3).all()


def test_scores_of_candidates_are_those_of_all_chunks(voted):
    torch.manual_seed(0)
    indexer = MemoryIndexer.from_spec(spec_of(voted), device="cpu")
    for encoder in indexer.query_encoder.encoders.values():
        torch.nn.init.normal_(encoder.extras.weight, std=0.1)
    rows = rows_of(voted)
    settings = CandidatesConfig(kind="sampled")
    batch = SampledCandidates(voted, [0, 1], 3, settings, seed=0)(rows)
    everything = AllCandidates(voted, [0, 1], 3, CandidatesConfig())(rows)
    features = {"input_features": batch["query_input_features"], "positions": batch["query_positions"]}
    queries = indexer.query_encoder(features)["sentence_embedding"]
    own = indexer.layer_logits(
        queries,
        batch["document_input_values"].float().flatten(1),
        batch["document_chunks"],
        batch["query_candidates"],
    )
    whole = indexer.layer_logits(queries, everything["document_input_values"].float().flatten(1))
    chunks = batch["document_chunks"][batch["query_candidates"]]
    torch.testing.assert_close(own, whole.gather(2, chunks.expand(len(own), -1, -1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_losses_on_all_chunks_as_candidates_are_the_same(voted, loss):
    torch.manual_seed(0)
    indexer = MemoryIndexer.from_spec(spec_of(voted), device="cpu")
    settings = CandidatesConfig(kind="sampled", negatives=1000)  # every negative there is
    rows, values = rows_of(voted), []
    for collator in (
        SampledCandidates(voted, [0, 1], 3, settings, seed=0),
        AllCandidates(voted, [0, 1], 3, CandidatesConfig()),
    ):
        batch = collator(rows)
        label = batch.pop("label")
        parts = [
            {name.removeprefix(side): value for name, value in batch.items() if name.startswith(side)}
            for side in ("query_", "document_")
        ]
        values.append(LOSSES[loss](indexer, 3.0)(parts, label))
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ["focal", "contrastive", "bpr"])
def test_an_indexer_learns_from_sampled_candidates(planted, tiny_recipe, tmp_path, loss):
    settings = tiny_recipe.train.model_copy(
        update={
            "loss": loss,
            "epochs": 12,
            "learning_rate": 3e-3,
            "windows_per_document": 32,
            "candidates": CandidatesConfig(kind="sampled", source="in_batch" if loss == "focal" else "uniform"),
        }
    )
    indexer = train(planted[0], IndexerConfig(heads=16, rank=32), settings, tmp_path)
    assert MassRecallEvaluator(planted[1], settings.budget)(indexer)["mass_recall"] > 0.8


def test_stride_and_tails(voted):
    index = window_index(voted, stride=3)
    assert len(index) and all(row["first"] % 3 == 0 for row in index)
    short = [row for row in window_index(voted) if row["last"] - row["first"] < 4]
    assert len(short) == 2 * len(list(voted))  # windows of 3 and 2 tokens at each end
    assert len(window_index(voted, tails=False)) == len(window_index(voted)) - len(short)


def test_weights_say_how_often_a_store_is_read(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for root in roots:
        votes_store(root, documents=4)
    store = mix(roots)
    index = window_index(store, weights={roots[1]: 2.5, roots[2]: 0.5})
    sampler = DocumentBatchSampler(index, batch_size=8, seed=1)
    drawn = [index[batch[0]]["document"] for batch in sampler]
    counts = np.bincount(drawn, minlength=12)
    assert len(drawn) == len(sampler) == 16
    assert (counts[:4] == 1).all() and counts[4:8].sum() == 10 and set(counts[4:8]) == {2, 3}
    assert counts[8:].sum() == 2 and counts[8:].max() == 1


def test_a_store_is_mixed_once_and_only_to_train_on(tmp_path, monkeypatch, stores):
    votes_store(tmp_path / "a", documents=2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path / 'a'}: given twice"):
        mix([Path("a"), tmp_path / "a"])
    with pytest.raises(InputError, match="held-out documents; train on others"):
        mix([stores[1].root])


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValidationError, match="only with `kind: sampled`"):
        CandidatesConfig(negatives=5)


@pytest.mark.parametrize("kind", [AllCandidates, SampledCandidates])
def test_what_is_in_memory_does_not_grow_with_the_store(tmp_path, monkeypatch, kind):
    def oracles():
        gc.collect()
        return sum(type(each) is SparseOracle for each in gc.get_objects())

    monkeypatch.setattr(batches, "OPEN_DOCUMENTS", 2)
    store, before = votes_store(tmp_path, documents=7), oracles()
    seed = {"seed": 0} if kind is SampledCandidates else {}
    settings = CandidatesConfig(kind="sampled" if seed else "all", common_weight=0.5)
    collator, index = kind(store, [0, 1], 4, settings, **seed), window_index(store)
    for rows in DocumentBatchSampler(index, 8):
        collator([index[row] for row in rows])
    assert oracles() - before == 2 and collator.common.cache_info().currsize == 2
