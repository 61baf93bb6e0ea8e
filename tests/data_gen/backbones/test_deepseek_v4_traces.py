"""From a DeepSeek-V4 to traces, and from its traces to an indexer that is measured."""

import pytest

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.load import adapter
from data_gen.generate import generate
from eval.offline.evaluation import threshold_for
from indexer_train.training.trainer import train
from recipes import load_recipe
from recipes.pocket.config import load_config
from recipes.pocket.documents import write_chats
from tests.conftest import tiny_model
from tests.eval.offline.recalled import evaluate_recall


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
        (store,) = generate(backbone, tokenizer, documents, trace, root, ["heldout"])
        for document in store:
            windows = document.windows(serving=True)
            labels = document.labels(windows)
            assert len(windows) and document.chunks in (document.meta.length // 4, (document.meta.length - 1) // 4)
            assert labels.mass.shape == (len(windows), document.chunks)
            if own_tokens and document.meta.task == "text":
                assert document.meta.length <= 500 + own_tokens and document.meta.spans[0].tail


@pytest.mark.parametrize("name", ["pocket-v4", "pocket-v4-votes"])
def test_an_indexer_trains_and_is_measured_on_the_traces(tmp_path, pocket, name):
    """On trained weights, from the backbone's own indexers on; labels of either oracle."""
    recipe = load_recipe(name)
    write_chats(load_config(pocket.folder.with_name("config.yaml")), tmp_path / "chats.jsonl", 40, (512, 600))
    documents = recipe.documents.model_copy(
        update={"source": str(tmp_path / "chats.jsonl"), "train": {"chat": 3}, "heldout": {"chat": 1}}
    )
    training, heldout = generate(pocket.backbone, pocket.tokenizer, documents, recipe.trace, tmp_path / "traces")
    config = recipe.train.model_copy(update={"epochs": 3, "validation_every": 3, "init": str(pocket.folder)})
    indexer = train(training, recipe.indexer, config, tmp_path / "run")
    info = training.manifest.backbone
    assert indexer.spec.rope == info.rope and indexer.spec.key == info.key == "fp8_rope_hadamard"
    threshold, note = threshold_for("indexer", indexer, 0.1)
    assert note is None
    rows = evaluate_recall(indexer, heldout, config.golden, threshold.cuts[0].score)
    found = {(row.policy, row.budget): row.mass_recall for row in rows if row.budget != "threshold"}
    assert all(0 <= recall <= found["oracle", budget] + 1e-6 for (_, budget), recall in found.items())
    assert found["indexer", 0.1] > 2 * max(found["recency", 0.1], found["random", 0.1]), found
    needed = {row.policy: row.golden_recall for row in rows if row.budget == 0.1}  # both losses are of golden chunks
    assert needed["indexer"] > 3 * max(needed["recency"], needed["random"]), needed
    native = "native_votes" if recipe.trace.oracle == "indexer" else "exact_attention"
    untrained = {"oracle", native, "frequency", "recency", "random", "protected"}  # nothing is pooled
    assert {row.policy for row in rows} == untrained | {"indexer", "layer 0", "layer 1", "layer 2"}
