from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from data_gen.core.errors import InputError
from eval.serving.pools import HotPool, side_lane
from eval.serving.residency import Residency
from tests.eval.serving.segments import segmented

SHAPE = (3, 5)


def bytes_of(units):
    """A unit's own bytes, never 255, which is the poison."""
    units = torch.as_tensor(np.asarray(units), dtype=torch.int64)[:, None]
    return ((units * 37 + torch.arange(15) * 11 + units // 97) % 251).to(torch.uint8).unflatten(1, SHAPE)


def pools(capacity, units):
    cold = segmented(16 * 5, SHAPE, torch.uint8, pageable=True)
    cold.append(bytes_of(range(units)))
    hot = HotPool(capacity, SHAPE, torch.uint8, "cpu")
    hot.storage.fill_(255)
    return cold, hot


def read(residency):
    return residency.hot.slots[residency.resident.slots.long()]


def check(residency):
    """All that is in force, and all that the table says can be read, is there."""
    assert torch.equal(read(residency), bytes_of(residency.resident.units))
    on_device = np.flatnonzero(residency.table.slot_of >= 0)
    assert torch.equal(residency.hot.slots[residency.table.slots(on_device)], bytes_of(on_device))


class Slow:
    """A lane whose work gets done unit by unit, in any order, when the test says so."""

    def __init__(self):
        self.left = []
        self.announced = True

    def submit(self, work, cold, units, hot, slots):
        def one(i):
            return lambda: work(cold, units[i : i + 1], hot, slots[i : i + 1])

        self.left = [one(i) for i in range(units.size)]
        self.announced = False
        return self

    def step(self, at):
        self.left.pop(at % len(self.left))()

    def done(self):
        return self.announced

    def result(self):
        while self.left:
            self.step(0)
        self.announced = True


class Windows(RuleBasedStateMachine):
    """Any order of refreshes, new units, progress and completion."""

    @initialize(capacity=st.integers(1, 20), units=st.integers(0, 40), reserve=st.integers(0, 3), lag=st.integers(0, 1))
    def start(self, capacity, units, reserve, lag):
        self.lane = Slow()
        self.reserve = min(reserve, capacity)
        self.residency = Residency(*pools(capacity, units), reserve=self.reserve, lane=self.lane if lag else None)
        self.asked = []

    @rule(seed=st.integers(0, 2**16), share=st.floats(0, 1))
    def refresh(self, seed, share):
        residency = self.residency
        units, capacity = residency.table.units, residency.hot.capacity
        wanted = np.sort(np.random.default_rng(seed).permutation(units)[: int(share * min(units, capacity + 1))])
        expected = set(residency.resident.units.tolist())
        may_be_late = not self.lane.announced and residency.planner.room() >= self.reserve
        if wanted.size + self.reserve > capacity and not may_be_late:
            with pytest.raises(InputError, match="do not fit"):
                residency.refresh(wanted)
            self.asked = []
            return
        window = residency.refresh(wanted)
        force = residency.resident.units.tolist()
        assert window.resident == len(force) and window.bytes == window.fetched * 16
        if window.late:
            assert set(force) == expected and may_be_late
        elif window.alone or residency._lane is None:
            assert force == wanted.tolist()
            self.asked = []
        else:
            if self.asked:
                assert set(self.asked) <= set(force)
            self.asked = wanted.tolist()

    @rule(count=st.integers(1, 3))
    def admit(self, count):
        residency = self.residency
        first = residency.table.units
        data = bytes_of(range(first, first + count))
        if residency.planner.room() < count:
            with pytest.raises(InputError, match="no slot"):
                residency.admit(data)
            assert residency.cold.units == residency.table.units == first
            return
        residency.admit(data)
        assert residency.resident.units[-count:].tolist() == list(range(first, first + count))

    @rule(count=st.integers(1, 5))
    def append(self, count):
        first = self.residency.table.units
        self.residency.append(bytes_of(range(first, first + count)))

    @precondition(lambda self: self.lane.left)
    @rule(at=st.integers(0, 30))
    def progress(self, at):
        self.lane.step(at)

    @precondition(lambda self: not self.lane.left)
    @rule()
    def announce(self):
        self.lane.announced = True

    @invariant()
    def nobody_reads_another_units_bytes(self):
        check(self.residency)
        assert (np.diff(self.residency.resident.units) > 0).all()
        assert self.residency.cold.units == self.residency.table.units


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_lag_1_serves_the_last_windows_wish_and_the_units_made_since():
    lane = Slow()
    residency = Residency(*pools(12, 30), reserve=2, lane=lane)
    assert residency.refresh(np.array([1, 2, 3])).alone
    lane.announced = True
    first = residency.refresh(np.array([2, 8, 9]))
    assert (first.fetched, first.resident, first.late) == (2, 3, False)
    residency.admit(bytes_of([30]))
    assert residency.resident.units.tolist() == [1, 2, 3, 30]
    assert residency.refresh(np.array([4])).late
    assert residency.resident.units.tolist() == [1, 2, 3, 30]
    residency.admit(bytes_of([31]))
    lane.result()
    assert residency.refresh(np.array([4, 31])).fetched == 1
    assert residency.resident.units.tolist() == [2, 8, 9, 30, 31]
    check(residency)


def test_a_fetch_that_is_late_too_long_is_waited_for():
    lane = Slow()
    residency = Residency(*pools(7, 30), reserve=2, lane=lane)
    residency.refresh(np.array([1, 2]))
    residency.refresh(np.array([2, 3, 4]))
    residency.admit(bytes_of([30, 31]))
    assert residency.resident.units.tolist() == [1, 2, 30, 31]  # the old set is served while the new one is on its way
    on_the_way = residency.planner.open.fetch_slots
    assert len(lane.left) == 2 and (residency.hot.slots[on_the_way] == 255).all()
    check(residency)
    assert not residency.refresh(np.array([3, 4])).late
    assert residency.resident.units.tolist() == [2, 3, 4, 30, 31] and lane.left == []
    check(residency)


def test_both_sets_without_room_are_fetched_alone():
    residency = Residency(*pools(4, 30), lane=Slow())
    residency.refresh(np.array([1, 2, 3]))
    window = residency.refresh(np.array([4, 5, 6]))
    assert window.alone and residency.resident.units.tolist() == [4, 5, 6]


def test_a_growing_page_is_written_on_both_sides():
    residency = Residency(*pools(2, 5))
    residency.refresh(np.array([3]))
    residency.write(3, (1,), torch.full((5,), 9, dtype=torch.uint8))
    assert (read(residency)[0, 1] == 9).all() and torch.equal(read(residency)[0], residency.cold[3])
    with pytest.raises(InputError, match="unit 4"):
        residency.write(4, (1,), torch.zeros(5, dtype=torch.uint8))


def test_units_of_another_kind_change_nothing():
    residency = Residency(*pools(4, 5))
    with pytest.raises(InputError, match="do not fit a pool"):
        residency.admit(torch.zeros(1, 2, dtype=torch.uint8))
    assert residency.table.units == residency.cold.units == 5


def test_a_failed_fetch_is_not_silent():
    with ThreadPoolExecutor(1) as lane:
        residency = Residency(*pools(8, 30), lane=lane)
        residency.refresh(np.array([1]))
        del residency.cold.segments[3:]
        residency.refresh(np.array([19]))
        with pytest.raises(IndexError):
            while residency.refresh(np.array([2])).late:
                pass


def rounds(residency, count, look):
    """Windows with a quarter of churn and two new units each, read between their admissions."""
    random = np.random.default_rng(0)
    wanted = np.arange(40)
    late = 0
    for _ in range(count):
        late += residency.refresh(wanted).late
        for _ in range(2):
            look()
            first = residency.table.units
            residency.admit(bytes_of([first]).to(residency.hot.device))
        look()
        kept = random.permutation(wanted)[: 3 * wanted.size // 4]
        new = np.setdiff1d(random.permutation(residency.table.units)[:10], kept)
        wanted = np.union1d(kept, new)[:60]
    return late


@pytest.mark.parametrize("lag", [0, 1])
def test_a_thread_fetches_beside_the_reader(lag):
    cold, hot = pools(160, 300)
    residency = Residency(cold, hot, reserve=2, lane=side_lane(hot.device) if lag else None)
    rounds(residency, 300, lambda: check(residency))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lag", [0, 1])
def test_a_stream_fetches_beside_the_reader(lag):
    cold = segmented(16 * 5, SHAPE, torch.uint8)
    cold.append(bytes_of(range(300)))
    hot = HotPool(160, SHAPE, torch.uint8, "cuda")
    hot.storage.fill_(255)
    residency = Residency(cold, hot, reserve=2, lane=side_lane(hot.device) if lag else None)
    seen = []
    late = rounds(residency, 300, lambda: seen.append((read(residency), residency.resident.units)))
    torch.cuda.synchronize()
    assert all(torch.equal(data.cpu(), bytes_of(units)) for data, units in seen)
    print(f"\nlag {lag}: {late} of 300 fetches late")
