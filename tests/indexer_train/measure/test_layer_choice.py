"""Layer choice against planted traces: one layer sees the secret, the other is blind."""

import pytest
import torch

from data_gen.core.errors import InputError
from indexer_train.config import IndexerConfig
from indexer_train.measure.layer_choice import choose_layers, criterion, served_as
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train


@pytest.fixture(scope="module")
def half_blind(planted, tiny_recipe, tmp_path_factory):
    """An indexer that finds planted chunks by layer 0 alone: layer 1 was scrambled after training."""
    settings = tiny_recipe.train.model_copy(
        update={"epochs": 8, "learning_rate": 3e-3, "windows_per_document": 32, "eval_epochs": 8}
    )
    indexer = train(planted[0], IndexerConfig(heads=16, rank=32), settings, tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    torch.nn.init.normal_(indexer.query_encoder.encoders["1"].wq_b.weight)
    return indexer


def test_the_layer_that_sees_is_chosen(half_blind, planted):
    best, *others = choose_layers(half_blind, planted[1], 1, 0.1)
    assert best.layers == [0] and best.mass_recall > 0.85
    assert len(others) == 5  # two subsets, three joining rules
    assert min(option.mass_recall for option in others) < 0.3


def test_the_figure_is_that_of_the_indexer_that_would_be_served(half_blind, planted):
    for option in choose_layers(half_blind, planted[1], 2, 0.1):
        served = served_as(half_blind, option, 0.1)
        (metric,) = served.spec.provenance.metrics  # those of the other layers and rule are gone
        assert metric.values == {"mass_recall": option.mass_recall, "peak_entropy": option.peak_entropy}
        assert served.spec.shape.join == option.join
        assert str(served.spec.selection) == metric.selection == "the best 10.0% of the chunks"
        found = MassRecallEvaluator(planted[1], 0.1)(served)
        assert found["mass_recall"] == pytest.approx(option.mass_recall)
        assert found["peak_entropy"] == pytest.approx(option.peak_entropy)


def test_choices_are_ranked_by_what_training_chose_by(half_blind, planted, monkeypatch):
    made = half_blind.spec.provenance
    assert criterion(half_blind) == made.train["choose"] == "mass_recall"
    by_mass = [option.mass_recall for option in choose_layers(half_blind, planted[1], 1, 0.1)]
    assert by_mass == sorted(by_mass, reverse=True)
    monkeypatch.setitem(made.train, "choose", "peak_entropy")
    by_entropy = choose_layers(half_blind, planted[1], 1, 0.1)
    assert by_entropy == sorted(by_entropy, key=lambda option: option.peak_entropy) and by_entropy[0].layers == [0]
    monkeypatch.setattr(half_blind.spec, "provenance", None)
    assert criterion(half_blind) == "peak_entropy"


def test_tasks_count_alike_as_in_the_choice_of_checkpoints(stores, tiny_recipe, tmp_path):
    indexer = train(stores[0], tiny_recipe.indexer, tiny_recipe.train.model_copy(update={"epochs": 1}), tmp_path)
    (held_out,) = [option for option in choose_layers(indexer, stores[1], 2, 0.2) if option.join == "sum"]
    assert MassRecallEvaluator(stores[1], 0.2)(indexer)["mass_recall"] == pytest.approx(held_out.mass_recall)


def test_greedy_growth_finds_the_seeing_layer_too(half_blind, planted, monkeypatch):
    monkeypatch.setattr("indexer_train.measure.layer_choice.EXHAUSTIVE", 1)
    options = choose_layers(half_blind, planted[1], 1, 0.1)
    assert [option.layers for option in options] == [[0]] * 3


def test_more_layers_than_there_are_is_refused(half_blind, planted):
    with pytest.raises(InputError, match="cannot choose 3"):
        choose_layers(half_blind, planted[1], 3, 0.1)


def test_training_documents_choose_nothing(half_blind, stores):
    with pytest.raises(InputError, match="training documents"):
        choose_layers(half_blind, stores[0], 1, 0.1)
