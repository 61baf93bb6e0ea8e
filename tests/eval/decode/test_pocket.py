"""Decoding with trained weights: what the sparse side keeps decides whether the question is answered."""

import pytest
import torch
from transformers import DynamicCache

from eval.decode.cycle import follow_text
from eval.decode.open import open_session
from eval.decode.policies import decode_policies
from eval.tasks.answers import Runner
from eval.tasks.config import BenchmarkConfig
from eval.tasks.examples import Example, user

BUDGET, QUESTIONS = 0.06, 12
"""Of the chunks, half of what the paper allows: a fact can be read in any of the eight chunks whose window holds it, so
a random 13 % often has one of them."""
POLICIES = ["indexer", "native", "recency", "random"]


@pytest.fixture(scope="module")
def records(pocket, pocket_indexer):
    """Questions under every policy, the indexer's weights those of the backbone's own."""
    config = BenchmarkConfig(budgets=[BUDGET], policies=POLICIES)
    context = pocket.backbone.info.context
    runner = Runner(pocket.backbone.model, pocket.tokenizer, pocket_indexer, config, False, context)
    return [
        runner.run(Example(str(index), "pocket", document.task, None, [user(document.prompt)], [document.answer],
                           "string_match_all", answer_tokens=1))
        for index, document in enumerate(pocket.documents("multi_key", 1000, QUESTIONS))
    ]  # fmt: skip


def runs(records, policy):
    return [run for record in records for run in record["runs"] if run["policy"] == policy]


def test_an_indexer_answers_what_recency_and_chance_do_not(records):
    right = {policy: sum(run["score"] for run in runs(records, policy)) for policy in ["full", *POLICIES]}
    assert right["full"] == QUESTIONS
    assert min(right["indexer"], right["native"]) >= 0.7 * QUESTIONS, right
    assert max(right["recency"], right["random"]) <= 0.25 * QUESTIONS, right


def test_no_policy_kept_more_than_its_budget(records):
    for policy in POLICIES:
        for run, full in zip(runs(records, policy), runs(records, "full"), strict=True):
            assert 0.05 < run["kept"] <= 0.075
            assert run["kv_bytes"] < 0.3 * full["kv_bytes"]


def test_with_everything_resident_it_is_the_stock_model(pocket, pocket_indexer):
    """Bit for bit: the same pieces through the stock model's own cache."""
    model = pocket.backbone.model
    (document,) = pocket.documents("copy", 300, 1)
    ids = pocket.tokens(document)
    prompt, rest = ids[:260], ids[260:]
    session = open_session(model, pocket_indexer.spec)
    session.read(prompt)
    logits, usage = follow_text(session, decode_policies(pocket_indexer)["indexer"], 1.0, 16, rest)
    cache, expected = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(torch.tensor([prompt]), past_key_values=cache)
        for token in rest:
            expected.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    assert usage.refreshes == 3 and usage.kept_share == 1
    assert torch.equal(logits, torch.stack(expected))
