"""A set in two steps: until it is kept the old one is in force, then it is what keeping it late would have made.

And whatever sets follow each other, every row holds the chunk that the table says, and a move accounts for all of it.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.layers import attention_modules
from data_gen.core.errors import InputError
from eval.runtime.hosts.deepseek_v4 import DeepseekV4Host
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.resident import PAD, ResidentTable
from tests.conftest import tiny_model

SIZE, PROMPT = 4, 90  # 22 chunks, and two tokens of the next
IDS = torch.randint(0, 128, (2, 130), generator=torch.Generator().manual_seed(7))
OLD = [torch.tensor([0, 5, 9, 20, 21]), torch.tensor([0, 1, 21])]
NEW = [torch.tensor([0, 2, 5, 21]), torch.tensor([1, 2, 3, 4, 20])]


class Late:
    """A lane whose work is done when it is asked for: as slow as a fetch can be."""

    def submit(self, work, /, *args):
        self.work = work, args
        return self

    def result(self):
        work, args = self.work
        return work(*args)


@pytest.fixture(params=["llama", "gemma3", "deepseek_v4"])
def host(request):
    """A host that has read PROMPT tokens and keeps OLD."""
    model = tiny_model(request.param)
    if request.param == "deepseek_v4":
        host = DeepseekV4Host(model, DeepseekV4Backbone(model).info.full_layers[:1])
    else:
        host = DenseHost(model, SIZE, sorted(attention_modules(model))[-1:])
    host.read(IDS[:, :PROMPT])
    host.keep(OLD)
    return host


def read(host, tokens):
    return host.read(IDS[:, host.position + 1 : host.position + 1 + tokens])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7])  # none, a chunk unfinished, one complete, two
def test_a_prepared_set_is_one_that_is_kept_late(host, late, tokens, monkeypatch):
    if late:
        monkeypatch.setattr("eval.runtime.hosts.resident.side_lane", lambda device: Late())
    twin = host.fork()
    prepared = host.prepare(NEW)
    for _ in range(tokens):
        assert torch.equal(read(host, 1), read(twin, 1))  # the old set is in force
    total = (PROMPT + tokens) // SIZE
    assert [chunks.tolist() for chunks in host.cache.resident()] == [[*s.tolist(), *range(22, total)] for s in OLD]
    move, expected = host.keep(prepared), twin.keep([torch.cat([s, torch.arange(22, total)]) for s in NEW])
    assert (move.fetched, move.evicted) == (expected.fetched, expected.evicted) == (5, 4)
    assert host.resident_bytes() == twin.resident_bytes()
    for _ in range(6):
        assert torch.equal(read(host, 1), read(twin, 1))
    assert [chunks.tolist() for chunks in host.cache.resident()] == [
        chunks.tolist() for chunks in twin.cache.resident()
    ]
    everything = [torch.arange(host.cache.total)] * 2  # what came meanwhile went cold on both sides
    host.keep(host.prepare(everything))
    twin.keep(everything)
    assert torch.equal(read(host, 3), read(twin, 3))


@pytest.mark.parametrize("late", [False, True])
def test_forks_in_a_lag_go_on_on_their_own(host, late, monkeypatch):
    if late:
        monkeypatch.setattr("eval.runtime.hosts.resident.side_lane", lambda device: Late())
    plain = host.fork()
    prepared = host.prepare(NEW)
    read(host, 1)
    twin, other = host.fork(), host.fork()
    read(host, 3)
    host.keep(prepared)
    read(twin, 2)
    twin.keep(prepared)
    read(other, 1)
    other.keep(OLD)  # never takes what was prepared
    for fork, before, sets in ((host, 4, NEW), (twin, 3, NEW), (other, 2, OLD)):
        alone = plain.fork()
        for size in (1, *[before - 1] * (before > 1)):
            read(alone, size)
        alone.keep([torch.cat([s, torch.arange(22, alone.cache.total)]) if sets is NEW else s for s in sets])
        assert torch.equal(read(fork, 5), read(alone, 5))


def test_a_set_that_no_longer_fits_is_refused_and_nothing_changes(host):
    prepared, twin = host.prepare(NEW), host.fork()
    host.keep(OLD)
    with pytest.raises(ValueError, match="prepare it again"):
        host.keep(prepared)
    assert torch.equal(read(host, 5), read(twin, 5))
    prepared = host.prepare([torch.arange(host.cache.total)] * 2)
    host.cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="prepare it again"):
        host.keep(prepared)
    prepared = host.prepare(NEW)
    host.cache.reset()
    host.read(IDS[:, :PROMPT])
    with pytest.raises(ValueError, match="prepare it again"):
        host.keep(prepared)
    prepared = host.prepare(NEW)  # from where everything is resident
    host.cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="prepare it again"):
        host.keep(prepared)
    with pytest.raises(InputError, match=r"1 resident sets.* 2 sequences"):
        host.prepare(NEW[:1])
    with pytest.raises(InputError, match="ascending"):
        host.prepare([torch.tensor([3, 2])] * 2)


def test_an_error_of_the_fetch_comes_out_where_the_set_is_kept(host, monkeypatch):
    def broken(*_):
        raise RuntimeError("the copy failed")

    monkeypatch.setattr("eval.runtime.hosts.resident.best_copy", lambda *_: broken)
    prepared = host.prepare(NEW)
    read(host, 1)
    with pytest.raises(RuntimeError, match="the copy failed"):
        host.keep(prepared)
    monkeypatch.undo()
    host.keep(NEW)  # the old set is still in force, and the next one comes


def test_rows_are_laid_out_anew_when_only_their_padding_goes(host):
    """Reordered, both sequences keep what the shorter one did: nothing is fetched or evicted, and rows get fewer."""
    host.keep([torch.arange(5), torch.tensor([1, 2])])
    twin = host.fork()
    host.cache.reorder_cache(torch.tensor([1, 1]))
    move = host.keep([torch.tensor([1, 2])] * 2)
    assert (move.fetched, move.evicted) == (0, 0)
    twin.keep([torch.tensor([1, 2])] * 2)
    tokens = IDS[1:, PROMPT : PROMPT + 6].expand(2, -1)
    for token in tokens.split(1, dim=1):
        ours, theirs = host.read(token), twin.read(token)
        torch.testing.assert_close(ours[0], ours[1])
        torch.testing.assert_close(ours[1], theirs[1])
    assert host.resident_bytes() == twin.resident_bytes()


def entry(sequence, chunk):
    return 1000 * sequence + chunk


@st.composite
def histories(draw):
    """Turns of (chunks made, resident set of each sequence) for one to three sequences."""
    batch, total, turns = draw(st.integers(1, 3)), 0, []
    for _ in range(draw(st.integers(1, 6))):
        made = draw(st.integers(0, 9))
        total += made
        chunks = st.sets(st.integers(0, total - 1)) if total else st.just(set())
        turns.append((made, [sorted(draw(chunks)) for _ in range(batch)]))
    return batch, turns


@settings(max_examples=200)
@given(histories())
def test_rows_hold_what_the_table_says(history):
    batch, turns = history
    table, total = ResidentTable(), 0
    rows = torch.empty(batch, 0, dtype=torch.int64)
    before = [set() for _ in range(batch)]
    for made, resident in turns:
        fresh = [[entry(sequence, total + i) for i in range(made)] for sequence in range(batch)]
        rows = torch.cat([rows, torch.tensor(fresh, dtype=torch.int64).reshape(batch, made)], dim=1)
        total += made
        before = [chunks | set(range(total - made, total)) for chunks in before]
        move = table.move_to([torch.tensor(chunks, dtype=torch.int64) for chunks in resident], total)
        after = [set(chunks) for chunks in resident]
        assert move.fetched == sum(len(new - old) for new, old in zip(after, before, strict=True))
        assert move.evicted == sum(len(old - new) for new, old in zip(after, before, strict=True))
        table.fix(move, total)
        moved = torch.full(move.shape, PAD)
        moved[move.stay_to] = rows[move.stay]
        moved[move.fetch_to] = entry(*move.fetch)
        rows, before = moved, after
        for sequence, chunks in enumerate(resident):
            pads = move.shape[1] - len(chunks)
            assert rows[sequence].tolist() == [PAD] * pads + [entry(sequence, chunk) for chunk in chunks]
            assert table.chunks(total, batch)[sequence, pads:].tolist() == chunks
        assert table.padded() == (len({len(chunks) for chunks in resident}) > 1)
        assert table.evicted() == any(len(chunks) < total for chunks in resident)
