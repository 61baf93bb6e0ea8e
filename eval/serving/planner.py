"""What to fetch and what to drop when the wanted set changes: set difference, least recently wanted out first."""

from dataclasses import dataclass

import numpy as np

from data_gen.core.errors import InputError
from eval.serving.table import Table


@dataclass(frozen=True)
class Plan:
    """From what is on the device to `wanted` (ascending units). Unit fetch_units[i] goes to slot fetch_slots[i];
    evict_units leave evict_slots, some of which the fetched ones take. All [n] int32."""

    wanted: np.ndarray
    fetch_units: np.ndarray
    fetch_slots: np.ndarray
    evict_units: np.ndarray
    evict_slots: np.ndarray


class Planner:
    """Plans over one table. A unit that nobody wants stays while there is room, so that it may be wanted again.

    protected: units that every wanted set contains; reserve: the most units admitted between two plans.
    Raises InputError when the slots cannot hold these two.
    """

    def __init__(self, table: Table, protected: int = 0, reserve: int = 0) -> None:
        if protected + reserve > table.capacity:
            raise InputError(
                f"a hot pool of {table.capacity} slots is smaller than its protection: {protected} protected units "
                f"and {reserve} for new ones: give it more slots or protect less"
            )
        self.table = table
        self.reserve = reserve
        self.open: Plan | None = None
        self._window = 0
        self._in_force = 0
        self._wanted_in = np.full(table.capacity, -1, dtype=np.int64)  # the last window that wanted a slot's unit

    def plan(self, wanted: np.ndarray, overlap: bool = False) -> Plan:
        """Plan towards `wanted` and take its slots; what is evicted cannot be read from now on.

        overlap: the set in force is read on while the fetch runs, so none of its slots is taken. One plan at a time:
        `finish` it before the next. Raises InputError, with nothing changed, when `wanted` is not an ascending list
        of known units or does not fit.
        """
        if self.open is not None:
            raise RuntimeError("the last plan is not finished")
        wanted = self._checked(wanted)
        slots = self.table.slot_of[wanted]
        missing = slots < 0
        kept = slots[~missing]
        count = wanted.size - kept.size
        droppable = self._droppable(self._in_force) if overlap else self.table.unit_of >= 0
        droppable[kept] = False
        free = self.table.free()
        if count + self.reserve > free.size + np.count_nonzero(droppable):
            both = " beside the set in force" if overlap else ""
            raise InputError(
                f"{wanted.size} wanted units and {self.reserve} for new ones do not fit into {self.table.capacity} "
                f"slots{both}: raise the capacity or lower the cap of the selection"
            )
        evict_slots = self._oldest(droppable, count - free.size)
        evict_units = self.table.remove(evict_slots)
        fetch_units = wanted[missing]
        fetch_slots = np.concatenate([free[:count], evict_slots]).astype(np.int32)
        self.table.own(fetch_units, fetch_slots)
        self._window += 1
        self._wanted_in[kept] = self._window
        self._wanted_in[fetch_slots] = self._window
        self.open = Plan(wanted, fetch_units, fetch_slots, evict_units, evict_slots)
        return self.open

    def finish(self) -> None:
        """The fetch of the open plan is done: its units can be read, and its set is the one in force."""
        if self.open is None:
            raise RuntimeError("there is no plan to finish")
        self.table.publish(self.open.fetch_units, self.open.fetch_slots)
        self._in_force = self._window
        self.open = None

    def admit(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Number `count` new units and give them slots until the next plan; returns (units, slots).

        Raises InputError when only units of the set in force, or of the open plan, could make room.
        """
        free = self.table.free()
        droppable = self._droppable(self._in_force)
        if count > free.size + np.count_nonzero(droppable):
            raise InputError(
                f"no slot for {count} new units: all {self.table.capacity} are in use in this window: "
                "raise the capacity, or the planner's reserve"
            )
        dropped = self._oldest(droppable, count - free.size)
        self.table.remove(dropped)
        slots = np.concatenate([free[:count], dropped]).astype(np.int32)
        units = self.table.grow(count)
        self.table.own(units, slots)
        self.table.publish(units, slots)
        self._wanted_in[slots] = self._window
        return units, slots

    def room(self) -> int:
        """Slots that could be given to new units now."""
        return self.table.free().size + np.count_nonzero(self._droppable(self._in_force))

    def _droppable(self, since: int) -> np.ndarray:
        """[capacity] bool: owned slots whose unit no window from `since` on wanted."""
        return (self.table.unit_of >= 0) & (self._wanted_in < since)

    def _oldest(self, droppable: np.ndarray, count: int) -> np.ndarray:
        """The `count` droppable slots that were wanted longest ago, [count] int32; none for a negative count."""
        slots = np.flatnonzero(droppable).astype(np.int32)
        count = max(count, 0)
        if count < slots.size:
            slots = slots[np.argpartition(self._wanted_in[slots], count)[:count]]
        return slots

    def _checked(self, wanted: np.ndarray) -> np.ndarray:
        wanted = np.asarray(wanted)
        if wanted.ndim != 1 or not (np.issubdtype(wanted.dtype, np.integer) or wanted.size == 0):
            raise InputError(f"wanted units: shape {wanted.shape} of {wanted.dtype}: give a list of unit numbers")
        wanted = wanted.astype(np.int64)
        if wanted.size and (wanted[0] < 0 or wanted[-1] >= self.table.units or (np.diff(wanted) <= 0).any()):
            raise InputError(f"wanted units must ascend, each once, within 0 .. {self.table.units - 1}")
        return wanted.astype(np.int32)
