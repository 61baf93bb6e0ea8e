"""Votes made of attention train as the indexer oracle's own do; what is measured stays attention."""

from contextlib import nullcontext

import pytest
import torch

from data_gen.core.errors import InputError
from data_gen.traces.labels import top_p_votes
from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import RawTrace
from indexer_train.config import CandidatesConfig, IndexerConfig, TopPVotes
from indexer_train.data.batches import AllCandidates, SampledCandidates, window_index
from indexer_train.data.voted import VotedDocument, VotedStore
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import make_trainer, train


@pytest.fixture(scope="module")
def cast(stores, tmp_path_factory):
    """The training traces as a store of the indexer oracle would hold them, had its indexers voted like that."""
    manifest = stores[0].manifest
    trace = manifest.trace.model_copy(update={"oracle": "indexer"})
    store = TraceStore.create(tmp_path_factory.mktemp("cast"), manifest.model_copy(update={"trace": trace}))
    for number, document in enumerate(stores[0]):
        hidden, keys = ({layer: read(layer) for layer in trace.layers} for read in (document.hidden, document.keys))
        oracle = top_p_votes(document.attention, 0.5, 2)
        assert 0 < len(oracle.chunks) < len(document.attention.chunks)
        store.write(number, document.meta, RawTrace(hidden, keys, document.positions, oracle))
    return store


def test_batches_are_those_of_a_store_of_votes(stores, cast):
    voted = VotedStore(stores[0], TopPVotes(top_p=0.5, votes=2))
    index = window_index(voted)
    assert index[:] == window_index(cast)[:]
    rows = [row for row in index if row["document"] == 3][:40]
    for kind, more in ((AllCandidates, ()), (SampledCandidates, (0,))):
        settings = CandidatesConfig(kind="all" if kind is AllCandidates else "sampled", common_weight=0.5)
        one, other = (kind(store, [0, 2], 2, settings, *more)(rows) for store in (voted, cast))
        assert one.keys() == other.keys() and one["query_most_golden"] == other["query_most_golden"] > 0
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_only_the_training_side_sees_votes(stores, tiny_recipe, tmp_path):
    config = tiny_recipe.train.model_copy(update={"loss": "vote_weighted", "top_p_votes": TopPVotes(votes=3)})
    trainer = make_trainer(stores[0], tiny_recipe.indexer, config, tmp_path)
    collator = trainer.data_collator
    assert type(collator.document(0)) is VotedDocument and collator.golden == trainer.loss.golden == 3
    assert trainer.evaluator.served
    for served in trainer.evaluator.served:
        assert type(served.document) is TraceDocument and served.document.trace.oracle == "attention"


@pytest.mark.parametrize("loss", ["focal", "vote_weighted"])
def test_planted_chunks_are_found_by_votes(planted, tiny_recipe, tmp_path, loss):
    settings = tiny_recipe.train.model_copy(
        update={"loss": loss, "epochs": 8, "learning_rate": 3e-3, "windows_per_document": 32,
                "top_p_votes": TopPVotes(votes=1)}
    )  # fmt: skip
    indexer = train(planted[0], IndexerConfig(heads=16, rank=32), settings, tmp_path)
    assert MassRecallEvaluator(planted[1], settings.budget)(indexer)["mass_recall"] > 0.85


def test_votes_that_cannot_be_had_are_refused(stores, cast, tiny_recipe, tmp_path):
    for store, rule, complaint in (
        (cast, TopPVotes(), "votes of the backbone's own indexers; leave train.top_p_votes out"),
        (stores[0], TopPVotes(votes=4), "top_p_votes.votes: 4, but 3 layers vote"),
    ):
        settings = tiny_recipe.train.model_copy(update={"loss": "focal", "top_p_votes": rule})
        with pytest.raises(InputError, match=complaint):
            train(store, tiny_recipe.indexer, settings, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_more_votes_than_layers_make_nothing_golden(cast, tiny_recipe, tmp_path):
    for golden, refused in ((3, False), (4, True)):
        settings = tiny_recipe.train.model_copy(update={"golden": golden})
        with pytest.raises(InputError, match="golden 4: the oracle `indexer` says 3") if refused else nullcontext():
            make_trainer(cast, tiny_recipe.indexer, settings, tmp_path / "out")
