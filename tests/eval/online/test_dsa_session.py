"""Sessions of models whose lightning indexers pick tokens: what those indexers say of all chunks, resident or not."""

import pytest
import torch

from benchmarks.models import ids
from benchmarks.tiny_models import tiny
from eval.online.online_policies import native
from eval.online.session import DsaSession, open_session
from tests.data_gen.backbones.stock_indexers import stock_parts, stock_scores
from tests.eval.online.courses import followed, keeps
from tests.eval.runtime.indexers import untrained

TOKENS = ids(7, 110)[0].tolist()


@pytest.fixture(params=["deepseek_v32", "glm_moe_dsa"])
def model(request):
    return tiny(request.param)


def expected(model, length):
    """The shares of chunks of 4 among `length` tokens read, from the stock indexers' parts."""
    parts, whole = stock_parts(model, torch.tensor([TOKENS[:length]])), length // 4 * 4
    layers = sorted({layer for layer, _ in parts})
    shares = [stock_scores(model, parts, layer, length - 1)[:whole].softmax(0).view(-1, 4).sum(1) for layer in layers]
    return torch.stack(shares).mean(dim=0)


def test_native_is_what_the_stock_indexers_score(model):
    session = open_session(model, untrained(model).spec)
    assert isinstance(session, DsaSession)
    for first, last in ((0, 90), (90, 91), (91, 96)):  # several at once, one, and up to the end of a chunk
        session.read(TOKENS[first:last])
        torch.testing.assert_close(native(session), expected(model, last), atol=1e-5, rtol=1e-4)


def test_evicted_chunks_are_scored_all_the_same(model):
    """The first layer's hidden states do not depend on what is resident: its shares stay those of the stock model."""
    whole = open_session(model, untrained(model).spec)
    whole.read(TOKENS[:90])
    part = whole.fork()
    part.host.keep([torch.tensor([0, 20, 21])])
    torch.testing.assert_close(native(part), native(whole), atol=0, rtol=0)
    for session in (whole, part):
        session.read(TOKENS[90:91])
    first = min(whole.native)
    for ours, theirs in zip(part.native[first], whole.native[first], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert len(native(part)) == 22


def test_it_is_among_the_policies(model):
    indexer = untrained(model)
    session = open_session(model, indexer.spec)
    session.read(TOKENS[:80])
    found = followed(session, keeps(indexer, 0.2), 8, TOKENS[80:100])
    assert list(found) == ["full", "indexer", "native", "recency", "random"]
    assert found["native"][1].usage.kept_share < 0.5


def test_before_the_first_chunk_there_is_nothing_to_choose(model):
    indexer = untrained(model)
    session = open_session(model, indexer.spec)
    session.read(TOKENS[:2])
    for logits, course in followed(session, keeps(indexer, 0.2), 16, TOKENS[2:9]).values():
        assert course.usage.kept_share == 1
        torch.testing.assert_close(logits, model(torch.tensor([TOKENS[:9]])).logits[0, 2:], atol=1e-4, rtol=0)
