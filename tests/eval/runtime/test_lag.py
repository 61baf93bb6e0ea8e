"""Lags and first windows: the runtime against a decode written out here, in which the test keeps each set itself."""

import json

import pytest
import torch

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.runtime.runtime import HOSTS, LSARuntime, open_host
from indexer_train.selection import Budget
from tests.conftest import TINY_OF, tiny_model
from tests.eval.runtime.indexers import untrained

TAU, CHUNKING = 8, Chunking(tokens=4, sink=1, recent=2)
FIFTH, EVERYTHING = Budget(budget=0.2), Budget(budget=1.0)
GREEDY = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(scope="module", params=["gemma3", *map(TINY_OF.get, HOSTS)])
def family(request):
    return request.param


@pytest.fixture(params=["cpu", GPU])
def model(family, request):
    return tiny_model(family).to(request.param)


@pytest.fixture
def indexer(model):
    return untrained(model)


def prompt(length, rows=2, device="cpu"):
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(length)).to(device)


class ByHand:
    """Decoding with lag, from a host's lag 0 primitives alone. windows: (position, resident, fetched, evicted)."""

    def __init__(self, model, indexer, lag, first):
        self.host, self.indexer = open_host(model, indexer.spec), indexer.to(model.device)
        self.lag, self.first, self.windows = lag, first, []

    def choose(self):
        """The protected chunks and a fifth of all, by the indexer's own scores; of equals the older."""
        (first, last), total = CHUNKING.candidates(self.host.position), self.host.cache.total
        sets = []
        for hidden, keys in zip(self.host.hidden(), self.host.keys(), strict=True):
            position = torch.tensor([self.host.position], device=hidden.device)
            scores = self.indexer.joined_scores(hidden[None], keys, position)
            best = first + scores[0, first:last].sort(descending=True, stable=True).indices[: int(0.2 * total)].cpu()
            sets.append(torch.cat([torch.arange(first), best, torch.arange(last, total)]).sort().values)
        return self.host.position, total, sets

    def keep(self, choice):
        position, total, sets = choice
        before = [set(chunks.tolist()) for chunks in self.host.cache.resident()]
        since = torch.arange(total, self.host.cache.total)
        self.host.keep([torch.cat([chunks, since]) for chunks in sets])
        after = [set(chunks.tolist()) for chunks in self.host.cache.resident()]
        fetched, evicted = (
            sum(len(a - b) for a, b in zip(*pair, strict=True)) for pair in ((after, before), (before, after))
        )
        self.windows.append((position, sum(map(len, sets)), fetched, evicted))

    @torch.no_grad()
    def read(self, ids, new):
        """Read the prompt from where this is, then write `new` tokens; their logits [B, new, vocabulary]."""
        have, found, coming = self.host.position + 1, [], None
        if have:
            self.host.keep([torch.arange(self.host.cache.total)] * len(ids))
        if have < ids.shape[1] - 1:
            self.host.read(ids[:, have:-1])
        self.keep(self.choose())
        last, token, span = self.host.position, ids[:, -1:], self.first
        for _ in range(new):
            found.append(self.host.read(token))
            token = found[-1].argmax(dim=-1, keepdim=True)
            if coming is not None:
                self.keep(coming)
                coming = None
            if self.host.position - last >= span:
                last, coming, span = self.host.position, self.choose(), TAU
                if not self.lag:
                    self.keep(coming)
                    coming = None
        if coming is not None:
            self.keep(coming)
        return torch.stack(found, dim=1)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("length", "first"),
    [(200, TAU), (151, TAU), (200, 1)],  # of 200 the late token completes a chunk, of 151 it begins one
)
def test_the_runtime_is_decoding_by_hand(model, indexer, length, first, lag):
    """Logits, sets and statistics, in a second turn too: the first ends where a set was chosen that none read with."""
    runtime = LSARuntime(indexer, model, selection=FIFTH, lag=lag, first_window=first)
    hand = ByHand(model, indexer, lag, first)
    ids = prompt(length, device=model.device)
    for new in (3 * TAU, 21):
        found = runtime.generate(ids, max_new_tokens=new, **GREEDY)
        expected = hand.read(ids, new)
        torch.testing.assert_close(torch.stack(found.logits, dim=1), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.sequences[:, -new:].cpu(), expected.argmax(dim=-1).cpu())
        for ours, theirs in zip(runtime.host.cache.resident(), hand.host.cache.resident(), strict=True):
            assert torch.equal(ours, theirs)
        ids = torch.cat([found.sequences, prompt(9, device=model.device)], dim=1)
    ours = [(window.position, window.resident, window.fetched, window.evicted) for window in runtime.windows]
    second = next(i for i, window in enumerate(hand.windows) if window[0] > length + 3 * TAU)
    assert [w[:2] for w in ours] == [w[:2] for w in hand.windows] and len(ours) == (7 if first == TAU else 8)
    # The first window of a turn counts what was brought back for it as well.
    assert ours[:second] + ours[second + 1 :] == hand.windows[:second] + hand.windows[second + 1 :]
    assert sum(fetched for _, _, fetched, _ in ours[1:second]) > 0


def test_a_lag_does_change_what_the_late_token_sees(model, indexer):
    """Or the tests here would say nothing."""
    ids = prompt(200, device=model.device)
    at_once, late = (
        torch.stack(
            LSARuntime(indexer, model, selection=FIFTH, lag=lag).generate(ids, max_new_tokens=12, **GREEDY).logits
        )
        for lag in (0, 1)
    )
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(at_once, late, strict=True)]
    assert all(same[:TAU]) and not any(same[TAU : TAU + 1])


def test_everything_resident_is_the_models_own_generate(model, indexer):
    ids = prompt(150, device=model.device)
    runtime = LSARuntime(indexer, model, selection=EVERYTHING, lag=1)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 30}
    assert torch.equal(
        runtime.generate(ids, **options), model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    )


@pytest.mark.parametrize("where", [TAU, TAU + 1, TAU + 2])
def test_a_turn_after_one_that_was_broken_off_in_a_lag_is_like_the_first(model, indexer, where):
    ids = prompt(120, device=model.device)
    expected = torch.stack(
        LSARuntime(indexer, model, selection=FIFTH, lag=1).generate(ids, max_new_tokens=20, **GREEDY).logits
    )
    runtime = LSARuntime(indexer, model, selection=FIFTH, lag=1)

    def stop(written, *_, **__):
        if written.shape[1] == 120 + where:
            raise KeyboardInterrupt
        return torch.zeros(len(written), dtype=torch.bool, device=written.device)

    with pytest.raises(KeyboardInterrupt):
        runtime.generate(ids, max_new_tokens=20, stopping_criteria=[stop], **GREEDY)
    assert (runtime.cycle._coming is not None) == (where == TAU + 1)  # the callers' criteria come before the runtime's
    found = runtime.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(torch.stack(found.logits), expected)
    runtime.reset()
    assert runtime.host.position == -1 and not runtime.windows


def test_windows_are_counted_and_saved(model, indexer, tmp_path):
    runtime = LSARuntime(indexer, model, selection=FIFTH, lag=1)
    runtime.generate(prompt(200, device=model.device), max_new_tokens=30, **GREEDY)
    assert [window.position for window in runtime.windows] == [198, 206, 214, 222]
    for before, after in zip(runtime.windows, runtime.windows[1:], strict=False):
        held = before.resident + 2 * (after.chunks - before.chunks)
        assert after.resident == held + after.fetched - after.evicted
        assert after.fetched_bytes == after.fetched * runtime.host.cold_bytes > 0
    runtime.save_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["lag"] == 1 and trace["totals"]["windows"] == 4


def test_a_first_window_is_as_long_as_the_others_if_nothing_is_said(model, indexer):
    ids = prompt(100, device=model.device)
    found = [
        LSARuntime(indexer, model, selection=FIFTH, **said).generate(ids, max_new_tokens=12, **GREEDY)
        for said in ({}, {"first_window": TAU}, {"first_window": 1})
    ]
    usual, same, again = (torch.stack(each.logits) for each in found)
    assert torch.equal(usual, same)
    assert torch.equal(usual[0], again[0]) and not torch.allclose(usual[1], again[1], atol=1e-6)


def test_what_is_no_lag_or_first_window_is_refused(model, indexer):
    with pytest.raises(InputError, match="lag: 2"):
        LSARuntime(indexer, model, lag=2)
    for first in (0, TAU + 1):
        with pytest.raises(InputError, match=f"first_window: {first}; a window has 8 tokens, give 1 to 8"):
            LSARuntime(indexer, model, first_window=first)
