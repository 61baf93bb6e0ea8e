"""Decoding against the stock model: bitwise with everything resident, masked oracle with less."""

from typing import get_args

import pytest
import torch

from data_gen.backbones.families import Family
from data_gen.backbones.load import ADAPTERS
from data_gen.core.chunks import Chunking
from eval.online.session import SESSIONS, DenseSession, open_session
from eval.runtime.cycle import Choice
from eval.runtime.runtime import HOSTS
from tests.conftest import TINY_OF, tiny_model
from tests.eval.online.courses import followed
from tests.eval.runtime.indexers import untrained

CHUNKING = Chunking(tokens=4, sink=1, recent=2)


def tokens(length):
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(5)).tolist()


def stock_logits(model, ids, prompt):
    with torch.no_grad():
        output = model(torch.tensor([ids[:prompt]]), logits_to_keep=1)
        logits = [output.logits[0, -1]]
        for token in ids[prompt:]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
            logits.append(output.logits[0, -1])
    return logits


@pytest.mark.parametrize("family", ["gemma3", *map(TINY_OF.get, SESSIONS)])
def test_every_family_has_a_session_that_reads_as_the_stock_model(family):
    model, ids = tiny_model(family), tokens(60)
    session = open_session(model, untrained(model).spec)
    logits = [session.read(ids[:50]), *(session.read([token]) for token in ids[50:])]
    for ours, stock in zip(logits, stock_logits(model, ids, 50), strict=True):
        assert torch.equal(ours, stock)


def test_what_is_traced_can_be_decoded():
    assert list(ADAPTERS) == list(HOSTS) == list(SESSIONS) == list(get_args(Family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_resident_is_bitwise_stock(model, dtype):
    model = model.to(dtype)
    ids = tokens(90)
    session = DenseSession(model, CHUNKING)
    logits = [session.read(ids[:70])]
    session = session.fork()
    session.host.keep([torch.arange(14, 17)])
    session.host.keep([torch.arange(17)])  # fetched again
    logits += [session.read([token]) for token in ids[70:]]
    for ours, stock in zip(logits, stock_logits(model, ids, 70), strict=True):
        assert torch.equal(ours, stock)


def test_restricted_set_equals_a_masked_forward(model):
    ids = tokens(80)
    session = DenseSession(model, CHUNKING)
    session.read(ids[:70])
    resident = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 40, 41, 42, 43, *range(60, 70)])
    session.host.keep([torch.tensor([0, 2, 10, 15, 16])])
    ours = [session.read([token]) for token in ids[70:75]]
    ours.append(session.read(ids[75:80]))  # several tokens at once, as a second turn has

    layers = model.get_decoder().layers
    full = set(session.cache.full_layers)
    visible = torch.zeros(80, 80, dtype=torch.bool)
    visible[:70] = torch.ones(70, 70, dtype=torch.bool).tril().new_tensor(1).expand(70, 80)
    visible = visible & torch.ones(80, 80, dtype=torch.bool).tril()
    rows = torch.zeros(80, dtype=torch.bool)
    rows[resident] = True
    rows[70:] = True
    visible[70:] = rows & torch.ones(80, 80, dtype=torch.bool).tril()[70:]

    def masked(module, args, kwargs):
        kwargs["attention_mask"] = visible[None, None]
        return args, kwargs

    hooks = [layers[i].self_attn.register_forward_pre_hook(masked, with_kwargs=True) for i in sorted(full)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    for index in range(5):
        torch.testing.assert_close(ours[index], expected[70 + index], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[5], expected[79], atol=1e-4, rtol=1e-4)


def test_evicted_values_cannot_leak(model):
    ids = tokens(71)
    sessions = [DenseSession(model, CHUNKING) for _ in range(2)]
    for session in sessions:
        session.read(ids[:70])
    sessions[1].host.keep([torch.arange(17)])  # all of it goes cold
    for chunk in range(1, 15):
        sessions[1].cache.cold.pools[0][chunk].fill_(torch.nan)
    for session in sessions:
        session.host.keep([torch.tensor([0, 15, 16])])
    assert torch.equal(sessions[0].read(ids[70:]), sessions[1].read(ids[70:]))


def test_forks_do_not_disturb_each_other(model):
    ids = tokens(80)
    session = DenseSession(model, CHUNKING)
    session.read(ids[:70])
    twin = session.fork()
    twin.host.keep([torch.arange(15, 17)])
    for token in ids[70:75]:
        twin.read([token])
    again = [session.read([token]) for token in ids[70:75]]
    for ours, stock in zip(again, stock_logits(model, ids[:75], 70)[1:], strict=True):
        assert torch.equal(ours, stock)
    assert session.position == 74


def test_keep_protects_and_fills_the_budget(model):
    session = DenseSession(model, CHUNKING)
    session.read(tokens(70))  # 17 complete chunks, candidates 1..14, tokens 68 and 69 unfinished
    scores = torch.zeros(17)
    scores[[5, 9, 0, 16]] = torch.tensor([2.0, 3.0, 9.0, 9.0])
    session.host.keep(session.best(scores, 0.12).resident)  # floor(0.12 * 17) = 2
    kept = session.cache.layers[session.cache.full_layers[0]].keys
    expected = [*range(4), *range(20, 24), *range(36, 40), *range(60, 70)]
    full = DenseSession(model, CHUNKING)
    full.read(tokens(70))
    stored = full.cache.layers[full.cache.full_layers[0]].keys
    assert torch.equal(kept, stored[..., expected, :])


def test_chunk_keys_are_those_of_the_trace(model):
    from data_gen.backbones.dense import DenseBackbone
    from data_gen.config import TraceConfig

    ids = tokens(90)
    session = DenseSession(model, CHUNKING)
    session.read(ids[:70])
    session.host.keep([torch.arange(10, 17)])
    session.host.keep([torch.arange(17)])
    for token in ids[70:]:
        session.read([token])
    backbone = DenseBackbone(model)
    first = backbone.info.full_layers[0]
    config = TraceConfig(chunking=CHUNKING, layers=[first], window=8, tail=4, text_rows=16)
    raw = backbone.trace(ids, torch.tensor([89]), config)
    ours = session.cache.chunk_keys([first])[0, :, 0].float()
    torch.testing.assert_close(ours, raw.keys[first].float(), atol=2e-3, rtol=2e-3)


def test_reading_together_is_reading_alone(model):
    """Different resident sets in one forward pass: what each saw, noted and holds is as if it were alone."""
    ids = tokens(80)
    session = DenseSession(model, CHUNKING)
    session.read(ids[:70])
    kept = [torch.arange(17), torch.tensor([0, 2, 10, 15, 16]), torch.tensor([0, 15, 16])]
    alone, together = ([session.fork() for _ in kept] for _ in range(2))
    for sessions in (alone, together):
        for one, chunks in zip(sessions, kept, strict=True):
            one.host.keep([chunks])
    for token in ids[70:]:
        expected = torch.stack([one.read([token]) for one in alone])
        torch.testing.assert_close(DenseSession.read_each(together, [token] * 3), expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(alone, together, strict=True):
        assert one.position == other.position == 79 and one.resident_tokens == other.resident_tokens
        layers = one.cache.full_layers
        torch.testing.assert_close(one.cache.chunk_keys(layers), other.cache.chunk_keys(layers), atol=1e-2, rtol=1e-2)
        for layer in layers:
            torch.testing.assert_close(one.newest[layer].query, other.newest[layer].query, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.newest[layer].output, other.newest[layer].output, atol=1e-4, rtol=1e-4)


def test_a_text_can_begin_under_a_policy(model):
    """As an unconditional likelihood does: the first set is chosen once there is a token to choose from."""
    ids, chosen = tokens(12), []
    session = DenseSession(model, CHUNKING)

    def everything(session):
        chosen.append(session.position)
        return Choice([torch.arange(session.host.cache.total)], [0], ["demand"])

    logits = followed(session, {"all": everything}, 4, ids)["all"][0]
    for ours, stock in zip(logits, stock_logits(model, ids, 1), strict=True):
        assert torch.equal(ours, stock)
    assert chosen == [0, 4, 8]


def test_only_sessions_at_one_position_are_read_together(model):
    session = DenseSession(model, CHUNKING)
    session.read(tokens(70))
    ahead = session.fork()
    ahead.read([1])
    with pytest.raises(ValueError, match=r"\[70, 71\] tokens"):
        DenseSession.read_each([session, ahead], [1, 2])


def test_forks_write_behind_their_history_not_into_each_other(model):
    ids = tokens(73)
    session = DenseSession(model, CHUNKING)
    session.read(ids[:70])
    for token in ids[70:]:
        session.read([token])  # from here on there is room behind the last token
    twin = session.fork()
    logits = session.read([1])
    twin.read([2])
    again = session.read([3])
    for ours, stock in zip([logits, again], stock_logits(model, [*ids, 1, 3], 70)[-2:], strict=True):
        assert torch.equal(ours, stock)
