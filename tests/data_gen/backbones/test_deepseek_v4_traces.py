"""From a DeepSeek-V4 to traces, and from its traces to an indexer that is measured."""

import pytest

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.load import adapter
from data_gen.generate import generate
from eval.recall import evaluate_recall
from indexer_train.config import TrainConfig
from indexer_train.trainer import train
from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("deepseek_v4")


def test_generate_fills_a_store_either_way(tmp_path, model, tokenizer, tiny_recipe):
    backbone = adapter(model)
    assert isinstance(backbone, DeepseekV4Backbone)
    documents = tiny_recipe.documents.model_copy(update={"heldout": {"text": 1, "single": 1}})
    for oracle, own_tokens in (("indexer", 0), ("attention", 0), ("indexer", 24)):
        trace = tiny_recipe.trace.model_copy(update={"layers": [1, 3], "oracle": oracle, "own_tokens": own_tokens})
        root = tmp_path / f"{oracle}{own_tokens}"
        store = generate(backbone, tokenizer, documents, trace, "heldout", root, lambda items, _: items)
        for document in store:
            windows = document.windows(serving=True)
            labels = document.labels(windows)
            assert len(windows) and document.chunks in (document.meta.length // 4, (document.meta.length - 1) // 4)
            assert labels.mass.shape == (len(windows), document.chunks)
            if own_tokens and document.meta.task == "text":
                assert document.meta.length <= 500 + own_tokens and document.meta.spans[0].tail


@pytest.mark.parametrize("oracle", ["indexer", "attention"])
def test_an_indexer_trains_and_is_measured_on_the_traces(tmp_path, model, tokenizer, tiny_recipe, oracle):
    trace = tiny_recipe.trace.model_copy(update={"layers": [1, 3], "oracle": oracle})
    documents = tiny_recipe.documents.model_copy(update={"train": {"text": 4}})
    store = generate(DeepseekV4Backbone(model), tokenizer, documents, trace, "train", tmp_path, lambda items, _: items)
    loss = "focal" if oracle == "indexer" else "listwise_mass"
    config = TrainConfig(loss=loss, epochs=1, windows_per_document=8, validation_every=2, eval_epochs=1)
    indexer = train(store, tiny_recipe.indexer, config, tmp_path / "run")
    assert indexer.spec.rope == store.manifest.backbone.rope and indexer.spec.key == "fp8_rope_hadamard"
    rows = evaluate_recall(indexer, store, config.golden, indexer.spec.thresholds["0.1"])
    best = {row.budget: row.mass_recall for row in rows if row.policy == "oracle"}
    assert all(0 <= row.mass_recall <= best[row.budget] + 1e-6 for row in rows if row.budget != "threshold")
    native = "native_votes" if oracle == "indexer" else "exact_attention"
    untrained = {"oracle", native, "frequency", "recency", "random", "protected"}  # nothing is pooled
    assert {row.policy for row in rows} == untrained | {"indexer", "layer 1", "layer 3"}
