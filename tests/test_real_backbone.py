"""The whole path at small size on the real SmolLM2-135M, and its traces against its own eager attention."""

import pytest
import torch

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import load_backbone
from data_gen.generate import generate
from data_gen.text.documents import draw_documents
from data_gen.traces.labels import SparseOracle
from eval.offline.evaluation import threshold_for
from eval.online.decode import decode_check
from eval.online.session import DenseSession
from indexer_train.formats.bundle import export_bundle, load_bundle
from indexer_train.training.trainer import train
from recipes import load_recipe
from tests.data_gen.traces.spread import spread
from tests.eval.offline.recalled import evaluate_recall


@pytest.fixture(scope="module")
def recipe():
    settings = load_recipe("smollm2-quickstart").model_dump()
    settings["documents"] |= {
        "tokens": [420, 520],
        "train": {"text": 2, "single": 5, "multi_key": 1},
        "heldout": {"text": 1, "single": 3},
    }
    settings["trace"] |= {"text_rows": 128, "window": 32}
    settings["train"] |= {"epochs": 12, "validation_every": 4}
    settings["decode"] |= {"text_documents": 1, "text_tokens": 34, "answer_tokens": 16}
    return type(load_recipe("smollm2-quickstart")).model_validate(settings)


@pytest.fixture(scope="module")
def loaded(recipe):
    return load_backbone(recipe.backbone)


def test_stored_probabilities_are_the_models_own(recipe, loaded):
    model, tokenizer = loaded
    backbone = DenseBackbone(model)
    document = list(draw_documents(recipe.documents, recipe.trace, tokenizer, 8192, "heldout"))[-1]
    raw = backbone.trace(document.tokens, torch.tensor(document.positions), recipe.trace)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([document.tokens]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    chunks = len(document.tokens) // 16
    mean, peak = spread(SparseOracle.of(raw.oracle, chunks))
    own = torch.stack([layer[0][:, document.positions, : chunks * 16] for layer in attentions])
    pooled = own.unflatten(-1, (chunks, 16)).sum(-1)  # [layers, H, T, N]
    complete = torch.arange(chunks) < (torch.tensor(document.positions)[:, None] + 1) // 16
    torch.testing.assert_close(mean, pooled.mean((0, 1)) * complete, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(peak, pooled.amax(1).mean(0) * complete, atol=1e-3, rtol=1e-2)


def test_everything_resident_is_bitwise_the_stock_model(recipe, loaded):
    model, tokenizer = loaded
    ids = tokenizer("The lookahead window of sixty-four tokens decides which chunks stay. " * 12).input_ids
    session = DenseSession(model, recipe.trace.chunking)
    ours = [session.read(ids[:-4])] + [session.read([token]) for token in ids[-4:]]
    with torch.no_grad():
        output = model(torch.tensor([ids[:-4]]), logits_to_keep=1)
        assert torch.equal(ours[0], output.logits[0, -1])
        for token, logits in zip(ids[-4:], ours[1:], strict=True):
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
            assert torch.equal(logits, output.logits[0, -1])


def test_documents_to_decoding(recipe, loaded, tmp_path):
    model, tokenizer = loaded
    backbone = DenseBackbone(model)
    training, heldout = generate(backbone, tokenizer, recipe.documents, recipe.trace, tmp_path / "traces")
    indexer = train(training, recipe.indexer, recipe.train, tmp_path)
    threshold, _ = threshold_for("indexer", indexer, 0.1)
    rows = evaluate_recall(indexer, heldout, recipe.train.golden, threshold.cuts[0].score)
    recall = {row.policy: row.mass_recall for row in rows if (row.task, row.budget) == ("needles", 0.2)}
    assert recall["oracle"] > recall["indexer"] > recall["random"]
    assert recall["oracle"] > recall["mean_pooled"] > recall["random"]
    export_bundle(indexer, tmp_path / "bundle")
    documents = list(draw_documents(recipe.documents, recipe.trace, tokenizer, 8192, "heldout"))
    bundle = load_bundle(tmp_path / "bundle")
    few = documents[:3]  # the text and two of the questions
    found, answers = decode_check(model, tokenizer, bundle, few, recipe.decode, lambda items, _: items)
    by_policy = {row.policy: row for row in found}
    assert by_policy["full"].kv_share == 1 and by_policy["full"].agreement == 1
    assert by_policy["indexer"].kv_share < 0.6  # short documents: protection weighs
    assert by_policy["indexer"].refreshes == 2  # 34 tokens, windows of 32
    assert by_policy["full"].kl == 0 < by_policy["indexer"].kl
    assert by_policy["full"].correct == 2, answers
