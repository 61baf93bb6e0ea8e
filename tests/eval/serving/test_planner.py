import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.core.errors import InputError
from eval.serving.residency import Planner, SlotTable


def planner(capacity, units, **kwargs):
    made = Planner(SlotTable(capacity), **kwargs)
    made.table.grow(units)
    return made


def go(made, wanted, **kwargs):
    plan = made.plan(np.array(wanted), **kwargs)
    made.finish()
    return plan


def test_fetches_the_difference_and_evicts_only_for_room():
    made = planner(5, 20)
    first = go(made, [2, 5, 9])
    assert first.fetch_units.tolist() == [2, 5, 9] and first.evict_units.size == 0
    second = go(made, [5, 9, 11])
    assert second.fetch_units.tolist() == [11] and second.evict_units.size == 0
    back = go(made, [2, 5, 11])
    assert back.fetch_units.size == 0  # 2 had stayed: nobody needed its slot


def test_evicts_what_was_wanted_longest_ago():
    made = planner(4, 20)
    go(made, [0, 1])
    go(made, [0, 2])
    go(made, [0, 3])
    assert go(made, [0, 4]).evict_units.tolist() == [1]
    assert go(made, [0, 5]).evict_units.tolist() == [2]
    assert set(go(made, [6, 7]).evict_units.tolist()) == {3, 4}


def test_overlapping_takes_no_slot_of_the_set_in_force():
    made = planner(5, 20)
    go(made, [0, 1, 2])
    plan = made.plan(np.array([2, 3, 4]), overlap=True)
    assert plan.evict_units.size == 0
    assert made.table.slots(np.array([0, 1, 2])).size == 3  # still readable
    with pytest.raises(InputError, match="unit 3"):
        made.table.slots(np.array([3]))  # on its way
    made.finish()
    assert made.table.slots(plan.wanted).size == 3
    assert set(go(made, [2, 5, 6], overlap=False).evict_units.tolist()) <= {0, 1, 3, 4}


def test_no_room_changes_nothing():
    made = planner(4, 20)
    go(made, [0, 1, 2])
    before = made.table.unit_of.copy(), made.table.slot_of.copy()
    with pytest.raises(InputError, match="5 wanted units and 0 for new ones do not fit into 4 slots"):
        made.plan(np.arange(5))
    with pytest.raises(InputError, match="beside the set in force"):
        made.plan(np.array([2, 3, 4]), overlap=True)
    assert (made.table.unit_of == before[0]).all() and (made.table.slot_of == before[1]).all()
    go(made, [2, 3, 4])


def test_new_units_stay_until_the_next_plan():
    made = planner(6, 10, reserve=3)
    go(made, [1, 2, 3])
    units, slots = made.admit(3)
    assert units.tolist() == [10, 11, 12]
    assert (made.table.slots(units) == slots).all()
    with pytest.raises(InputError, match="no slot for 1 new units"):
        made.admit(1)
    with pytest.raises(InputError, match="do not fit"):
        made.plan(np.arange(4))  # would leave no room for 3 new ones
    assert set(go(made, [4, 5, 12]).evict_units.tolist()) < {1, 2, 3, 10, 11}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [([3, 1], "must ascend"), ([1, 1], "must ascend"), ([-1, 1], "within 0 .. 9"), ([9, 10], "within 0 .. 9")],
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint64])
def test_bad_lists_are_refused(wanted, message, dtype):
    with pytest.raises(InputError, match=message):
        planner(5, 10).plan(np.array(wanted).astype(dtype))


def test_bad_shapes_are_refused():
    with pytest.raises(InputError, match="give a list of unit numbers"):
        planner(5, 10).plan(np.ones((2, 2), dtype=np.int64))
    with pytest.raises(InputError, match="give a list of unit numbers"):
        planner(5, 10).plan(np.ones(2))


def test_capacity_below_protection_is_refused():
    with pytest.raises(InputError, match="8 slots is smaller than its protection: 7 protected units and 2"):
        Planner(SlotTable(8), protected=7, reserve=2)


def test_one_plan_at_a_time():
    made = planner(5, 10)
    made.plan(np.array([1]))
    with pytest.raises(RuntimeError, match="not finished"):
        made.plan(np.array([1]))
    made.finish()
    with pytest.raises(RuntimeError, match="no plan"):
        made.finish()


@settings(max_examples=40)
@given(
    st.integers(1, 24),
    st.integers(0, 3),
    st.integers(0, 60),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_slot_read_through_the_table_holds_its_unit(capacity, reserve, units, overlap, seed):
    """150 windows of random access each. Slots are cells; a fetch writes its cells only when it finishes."""
    random = np.random.default_rng(seed)
    reserve = min(reserve, capacity)
    made = planner(capacity, units, reserve=reserve)
    cells = {}
    wanted_in = {}
    in_force: set[int] = set()

    def readable():
        slots = made.table.slot_of
        on_device = np.flatnonzero(slots >= 0).tolist()
        assert len({int(slots[unit]) for unit in on_device}) == len(on_device)
        for unit in on_device:
            assert cells[int(slots[unit])] == unit
        assert in_force <= set(on_device)

    for window in range(150):
        count = int(random.integers(0, min(capacity, made.table.units) + 2))
        wanted = np.sort(random.permutation(made.table.units)[:count])
        must_fit = set(wanted.tolist()) | (in_force if overlap else set())
        had = set(np.flatnonzero(made.table.slot_of >= 0).tolist())
        if len(must_fit) + reserve > capacity:
            with pytest.raises(InputError, match="do not fit"):
                made.plan(wanted, overlap=overlap)
            made.plan(np.empty(0, dtype=np.int64))  # as a caller does: fewer
            in_force = set()
            made.finish()
            readable()
            continue
        plan = made.plan(wanted, overlap=overlap)
        assert set(plan.fetch_units.tolist()) == set(wanted.tolist()) - had
        evicted = set(plan.evict_units.tolist())
        assert not evicted & must_fit
        assert len(evicted) == max(0, len(had) + plan.fetch_units.size - capacity)  # only for room
        stay = had - must_fit - evicted
        if evicted and stay:
            assert max(wanted_in[unit] for unit in evicted) <= min(wanted_in[unit] for unit in stay)
        wanted_in.update(dict.fromkeys(wanted.tolist(), window))
        if not overlap:
            in_force = set()
        readable()

        def admit(count, window=window):
            new, slots = made.admit(count)
            cells.update(zip(slots.tolist(), new.tolist(), strict=True))
            wanted_in.update(dict.fromkeys(new.tolist(), window))
            return set(new.tolist())

        early = admit(int(random.integers(0, reserve + 1))) if overlap else set()
        in_force |= early
        readable()
        cells.update(zip(plan.fetch_slots.tolist(), plan.fetch_units.tolist(), strict=True))
        made.finish()
        in_force = set(wanted.tolist()) | early
        readable()
        in_force |= admit(reserve - len(early))
        readable()
