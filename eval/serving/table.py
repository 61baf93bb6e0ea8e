"""Where a unit of history lies on the device: the one table that everybody reads."""

import numpy as np

from data_gen.core.errors import InputError


class Table:
    """Units 0 .. N-1 (chunks, or pages of chunks) over a fixed number of device slots.

    slot_of: [N] int32, the slot in which a unit can be read, -1 if nowhere; unit_of: [capacity] int32, the unit that
    owns a slot, -1 for a free one. A slot is owned before it can be read: while its bytes are on their way.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"a hot pool of {capacity} slots holds nothing: give it at least one")
        self.unit_of = np.full(capacity, -1, dtype=np.int32)
        self._slot_of = np.full(1024, -1, dtype=np.int32)
        self.units = 0

    @property
    def capacity(self) -> int:
        return self.unit_of.size

    @property
    def slot_of(self) -> np.ndarray:
        return self._slot_of[: self.units]

    def grow(self, count: int) -> np.ndarray:
        """Number `count` new units, on the device nowhere yet; returns their numbers, ascending."""
        first, self.units = self.units, self.units + count
        if self.units > self._slot_of.size:
            spare = max(self.units, 2 * self._slot_of.size) - self._slot_of.size
            self._slot_of = np.concatenate([self._slot_of, np.full(spare, -1, dtype=np.int32)])
        return np.arange(first, self.units, dtype=np.int32)

    def free(self) -> np.ndarray:
        """Slots that nobody owns, ascending."""
        return np.flatnonzero(self.unit_of < 0)

    def own(self, units: np.ndarray, slots: np.ndarray) -> None:
        """Give free slots to units; they cannot be read there yet."""
        self.unit_of[slots] = units

    def publish(self, units: np.ndarray, slots: np.ndarray) -> None:
        """The bytes of these units are in their slots: from now on they are read there."""
        self._slot_of[units] = slots

    def remove(self, slots: np.ndarray) -> np.ndarray:
        """Free owned slots; returns the units that lose them."""
        units = self.unit_of[slots]
        self._slot_of[units] = -1
        self.unit_of[slots] = -1
        return units

    def slots(self, units: np.ndarray) -> np.ndarray:
        """The slots of units that are on the device, [n] int32. Raises InputError for one that is not."""
        slots = self.slot_of[units]
        if slots.size and slots.min() < 0:
            absent = np.asarray(units)[slots < 0]
            raise InputError(f"unit {absent[0]} ({absent.size} in all) is not on the device: fetch it before reading")
        return slots
