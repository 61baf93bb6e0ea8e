"""Decoding with trained weights: what the sparse side keeps decides whether the question is answered."""

import pytest
import torch
from transformers import DynamicCache

from data_gen.generate import generate
from data_gen.text.documents import user
from eval.online.examples import Example
from eval.online.online_policies import indexer_policy
from eval.online.runner import Runner
from eval.online.session import open_session
from eval.runtime.runtime import LSARuntime
from indexer_train.formats.bundle import export_bundle, load_bundle
from indexer_train.formats.native import read_native
from indexer_train.selection import Budget
from indexer_train.training.trainer import train
from recipes import load_recipe
from recipes.pocket.config import load_config
from recipes.pocket.documents import write_chats
from tests.eval.online.courses import followed, ranked

BUDGET, QUESTIONS, LENGTH = 0.06, 8, 600
"""Of the chunks, half of what the paper allows: a fact can be read in any of the eight chunks whose window holds it, so
a random 13 % often has one of them."""
POLICIES = ["indexer", "native", "recency", "random"]


@pytest.fixture(scope="module")
def trained(pocket, tmp_path_factory):
    """A memory indexer of recipe pocket-v4 that begins as the backbone's own ones and has seen six short chats twice,
    as its bundle holds it."""
    root = tmp_path_factory.mktemp("trained")
    pocket_config = load_config(pocket.folder.with_name("config.yaml"))
    write_chats(pocket_config, root / "chats.jsonl", 8, (512, 640))  # of which hashes hold some out
    recipe = load_recipe("pocket-v4")
    documents = recipe.documents.model_copy(
        update={"source": str(root / "chats.jsonl"), "train": {"chat": 6}, "heldout": {}}
    )
    (store,) = generate(pocket.backbone, pocket.tokenizer, documents, recipe.trace, root / "traces", ["train"])
    settings = recipe.train.model_copy(update={"epochs": 2, "learning_rate": 1e-3, "init": str(pocket.folder)})
    export_bundle(train(store, recipe.indexer, settings, root / "run"), root / "bundle")
    return load_bundle(root / "bundle")


@pytest.fixture(scope="module")
def questions(pocket):
    return pocket.documents("multi_key", LENGTH, QUESTIONS)


@pytest.fixture(scope="module")
def records(pocket, trained, questions):
    """The questions under every policy."""
    runner = Runner(
        pocket.backbone.model, pocket.tokenizer, trained, POLICIES, [BUDGET], context=pocket.backbone.info.context
    )
    return [
        runner.run(Example(str(index), "pocket", document.task, None, [user(document.prompt)], [document.answer],
                           "string_match_all", answer_tokens=1))
        for index, document in enumerate(questions)
    ]  # fmt: skip


def runs(records, policy):
    return [run for record in records for run in record.runs if run.policy == policy]


def test_the_indexer_was_trained(pocket, trained):
    """What answers below is not a copy of the backbone's own indexers."""
    for layer, native in read_native(pocket.folder, trained.spec.layers).items():
        ours = trained.query_encoder.encoders[str(layer)].wq_b.weight.detach()
        heads = native.wq_b.shape[0]
        assert float((ours[:heads, : native.wq_b.shape[1]] - native.wq_b).norm() / native.wq_b.norm()) > 0.01


def test_an_indexer_answers_what_recency_and_chance_do_not(records):
    right = {policy: sum(run.score for run in runs(records, policy)) for policy in ["full", *POLICIES]}
    assert right["full"] == QUESTIONS
    assert min(right["indexer"], right["native"]) >= 0.7 * QUESTIONS, right
    assert max(right["recency"], right["random"]) <= 0.25 * QUESTIONS, right


def test_the_runtime_answers_as_many(pocket, trained, questions, records):
    """Its prompts are read whole, the runner's up to the last token: a near-tie may fall either way."""
    runtime, right = LSARuntime(trained, pocket.backbone.model, selection=Budget(budget=BUDGET)), 0
    for question in questions:
        ids = pocket.tokenizer(question.prompt, return_tensors="pt").input_ids
        runtime.reset()
        written = runtime.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None)[0, -1:]
        right += pocket.tokenizer.decode(written) == question.answer
        assert runtime.windows[0].resident <= 0.075 * runtime.windows[0].chunks
    chance = max(sum(run.score for run in runs(records, policy)) for policy in ("recency", "random"))
    assert right >= max(0.7 * QUESTIONS, chance + 4), (right, chance)


def test_no_policy_kept_more_than_its_budget(records):
    for policy in POLICIES:
        for run, full in zip(runs(records, policy), runs(records, "full"), strict=True):
            assert 0.05 < run.kept <= 0.075
            assert run.kv_bytes < 0.3 * full.kv_bytes


def test_with_everything_resident_it_is_the_stock_model(pocket, pocket_indexer):
    """Bit for bit: the same pieces through the stock model's own cache."""
    model = pocket.backbone.model
    (document,) = pocket.documents("copy", 220, 1)
    ids = pocket.tokens(document)
    prompt, rest = ids[:180], ids[180:]  # the prompt is one piece
    session = open_session(model, pocket_indexer.spec)
    session.read(prompt)
    policy = ranked(1.0, indexer=indexer_policy(pocket_indexer))
    logits, run = followed(session, policy, 16, rest)["indexer"]
    cache, expected = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(torch.tensor([prompt]), past_key_values=cache)
        for token in rest:
            expected.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    assert run.usage.refreshes == 3 and run.usage.kept_share == 1
    assert torch.equal(logits, torch.stack(expected))
