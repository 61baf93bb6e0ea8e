"""Decode-time policies score what the trace of the same document says, and the cycle refreshes when it should."""

import re

import pytest
import torch
from pydantic import ValidationError

from data_gen.core.chunks import Chunking
from data_gen.text.documents import draw_documents
from eval.online.config import BenchmarkConfig
from eval.online.online_policies import ONLINE_POLICIES, indexer_policy, mean_pooled, random, recency
from eval.online.session import DenseSession
from eval.online.summary import wilson
from eval.runtime.correction import Correction
from indexer_train.measure.metrics import DocumentScorer, served_windows
from indexer_train.training.trainer import train
from tests.conftest import tiny_model
from tests.eval.online.courses import followed, ranked, written


@pytest.fixture(scope="module")
def trained(stores, tiny_recipe, tmp_path_factory):
    return train(stores[0], tiny_recipe.indexer, tiny_recipe.train, tmp_path_factory.mktemp("run"))


def test_scores_while_decoding_are_those_of_the_trace(trained, stores, tiny_recipe, tokenizer):
    documents = list(draw_documents(tiny_recipe.documents, tiny_recipe.trace, tokenizer, 512, "heldout"))
    compared = 0
    for document, served in zip(documents, served_windows(stores[1]), strict=True):
        position = int(served.positions[0])
        session = DenseSession(tiny_model("llama"), tiny_recipe.trace.chunking)
        session.read(document.tokens[: position - 3])
        for token in document.tokens[position - 3 : position + 1]:
            session.read([token])
        assert session.position == position
        visible = (position + 1) // 4
        expected = DocumentScorer(trained, served.document).joined_scores(served)[0, :visible]
        torch.testing.assert_close(indexer_policy(trained)(session), expected, atol=2e-3, rtol=2e-3)
        stored = served.document.mean_pooled[served.windows[0, 0], :visible].float()
        torch.testing.assert_close(mean_pooled(session), stored, atol=1e-3, rtol=1e-2)
        assert recency(session).tolist() == sorted(recency(session).tolist())
        assert torch.equal(random(session), random(session)) and len(random(session)) == visible
        compared += 1
    assert compared == 4


def test_the_cycle_refreshes_every_window_and_before_the_first_token(tiny_recipe):
    ids = torch.randint(0, 128, (120,), generator=torch.Generator().manual_seed(5)).tolist()
    session = DenseSession(tiny_model("llama"), tiny_recipe.trace.chunking)
    session.read(ids[:80])
    asked = []

    def policy(state):
        asked.append(state.position)
        return torch.arange(state.chunking.visible(state.position)).float().neg()  # oldest first

    both = ranked(0.1, oldest=policy) | {"full": None}
    (logits, course), (full, whole) = followed(session, both, 8, ids[80:100]).values()
    usage = course.usage
    assert asked == [79, 87, 95] and usage.refreshes == 3 and usage.steps == len(logits) == 20
    expected = 0
    for position, reads in ((79, 8), (87, 8), (95, 4)):
        visible, unfinished = divmod(position + 1, 4)
        fixed = 4 * (1 + 2 + visible // 10) + unfinished  # sink, recent, a tenth of what is visible
        expected += sum(fixed + 1 + step for step in range(reads))
    assert usage.resident == expected
    assert whole.usage.kept_share == 1 and not torch.equal(full[0], logits[0])  # the first token is sparse already


def test_generation_stops_at_a_stop_token_or_at_its_length():
    session = DenseSession(tiny_model("llama"), Chunking(tokens=4, sink=1, recent=2))
    session.read([5, 6, 7] * 20)
    answer, _ = written(session, {"full": None}, 8, 5, 6)["full"]
    assert len(answer) == 6
    stopped, _ = written(session, {"full": None}, 8, 5, 6, lambda said: said[-1] == answer[2])["full"]
    assert stopped == answer[: answer.index(answer[2]) + 1]


def test_wilson_interval():
    low, high = wilson(20, 36)
    assert (round(low, 3), round(high, 3)) == (0.396, 0.705)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_recipe_may_name_every_policy_and_no_other():
    names = [policy.name for policy in ONLINE_POLICIES]
    correction = Correction(chunks=8)
    assert BenchmarkConfig(policies=names, correction=correction).policies == names and len(set(names)) == len(names)
    with pytest.raises(ValidationError, match=r"indexer\+correction needs a correction"):
        BenchmarkConfig(policies=names)
    listed = f"Input should be {', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
    with pytest.raises(ValidationError, match=re.escape(listed)) as caught:
        BenchmarkConfig(policies=["indexer", "full"])
    assert caught.value.errors()[0]["loc"] == ("policies", 1)
