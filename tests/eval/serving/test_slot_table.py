import numpy as np
import pytest

from data_gen.core.errors import InputError
from eval.serving.residency import SlotTable


def test_a_unit_is_owned_first_and_readable_later():
    table = SlotTable(3)
    units = table.grow(5)
    assert units.tolist() == [0, 1, 2, 3, 4]
    table.own(units[1:3], np.array([2, 0]))
    assert table.free().tolist() == [1]
    with pytest.raises(InputError, match=r"unit 1 \(2 in all\) is not on the device"):
        table.slots(units[:3][1:])
    table.publish(units[1:3], np.array([2, 0]))
    assert table.slots(np.array([2, 1])).tolist() == [0, 2]
    assert table.remove(np.array([2])).tolist() == [1]
    assert table.slot_of.tolist() == [-1, -1, 0, -1, -1]
    assert table.unit_of.tolist() == [2, -1, -1]


def test_growing_keeps_what_is_there():
    table = SlotTable(2)
    table.grow(1000)
    table.own(np.array([999]), np.array([1]))
    table.publish(np.array([999]), np.array([1]))
    assert table.grow(3000)[0] == 1000
    assert table.units == table.slot_of.size == 4000
    assert table.slots(np.array([999])).tolist() == [1]
    assert np.count_nonzero(table.slot_of >= 0) == 1


def test_no_slots_are_refused():
    with pytest.raises(InputError, match="holds nothing"):
        SlotTable(0)
