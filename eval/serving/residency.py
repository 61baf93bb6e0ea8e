"""What is resident, window after window, for engines with paged kernels: one sequence, slots in any order.

Called by a serving engine, which gives it the units that Level 1 asks for and reads them where `InForce` says. Paged
kernels take slots in any order, so that what stays resident never moves. The hosts of Hugging Face models keep compact
rows in the order of chunks instead (eval/runtime/hosts/resident.py), because stock attention reads contiguous tensors:
they share the cold pool and the copies with this (pools.py), not the table.

Three parts: `SlotTable` says where a unit lies, `Planner` what to fetch and what to drop, `Residency` does it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data_gen.core.errors import InputError
from eval.serving.pools import ColdPool, HotPool, Lane, Ticket, best_copy


class SlotTable:
    """Units 0 .. N-1 (chunks, or pages of chunks) over a fixed number of device slots.

    slot_of: [N] int32, the slot in which a unit can be read, -1 if nowhere; unit_of: [capacity] int32, the unit that
    owns a slot, -1 for a free one. A slot is owned before it can be read: while its bytes are on their way.
    Raises InputError for a capacity of no slot.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"a hot pool of {capacity} slots holds nothing: give it at least one")
        self.unit_of = np.full(capacity, -1, dtype=np.int32)
        self._slot_of = np.full(1024, -1, dtype=np.int32)
        self.units = 0

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self.unit_of.size

    @property
    def slot_of(self) -> np.ndarray:
        """[N] int32: where each unit can be read, -1 if nowhere."""
        return self._slot_of[: self.units]

    def grow(self, count: int) -> np.ndarray:
        """Number `count` new units, on the device nowhere yet; returns their numbers [count], ascending."""
        first, self.units = self.units, self.units + count
        if self.units > self._slot_of.size:
            spare = max(self.units, 2 * self._slot_of.size) - self._slot_of.size
            self._slot_of = np.concatenate([self._slot_of, np.full(spare, -1, dtype=np.int32)])
        return np.arange(first, self.units, dtype=np.int32)

    def free(self) -> np.ndarray:
        """Slots that nobody owns, [n] ascending."""
        return np.flatnonzero(self.unit_of < 0)

    def own(self, units: np.ndarray, slots: np.ndarray) -> None:
        """Give free slots [n] to units [n]; they cannot be read there yet."""
        self.unit_of[slots] = units

    def publish(self, units: np.ndarray, slots: np.ndarray) -> None:
        """The bytes of units [n] are in slots [n]: from now on they are read there."""
        self._slot_of[units] = slots

    def remove(self, slots: np.ndarray) -> np.ndarray:
        """Free owned slots [n]; returns the units [n] that lose them."""
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


@dataclass(frozen=True)
class FetchPlan:
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

    def __init__(self, table: SlotTable, protected: int = 0, reserve: int = 0) -> None:
        if protected + reserve > table.capacity:
            raise InputError(
                f"a hot pool of {table.capacity} slots is smaller than its protection: {protected} protected units "
                f"and {reserve} for new ones: give it more slots or protect less"
            )
        self.table = table
        self.reserve = reserve
        self.open: FetchPlan | None = None
        self._window = 0
        self._in_force = 0
        self._wanted_in = np.full(table.capacity, -1, dtype=np.int64)  # the last window that wanted a slot's unit

    def plan(self, wanted: np.ndarray, overlap: bool = False) -> FetchPlan:
        """FetchPlan towards `wanted` [R] and take its slots; what is evicted cannot be read from now on.

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
        self.open = FetchPlan(wanted, fetch_units, fetch_slots, evict_units, evict_slots)
        return self.open

    def finish(self) -> FetchPlan:
        """The fetch of the open plan, returned, is done: its units can be read, and its set is the one in force."""
        if self.open is None:
            raise RuntimeError("there is no plan to finish")
        done, self.open = self.open, None
        self.table.publish(done.fetch_units, done.fetch_slots)
        self._in_force = self._window
        return done

    def admit(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Number `count` new units and give them slots until the next plan; returns (units, slots), [count] int32 each.

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
        return int(self.table.free().size + np.count_nonzero(self._droppable(self._in_force)))

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


@dataclass(frozen=True)
class InForce:
    """The set in force. units: [R] int32, ascending; slots: [R] int32 on the device, where each can be read."""

    units: np.ndarray
    slots: torch.Tensor


@dataclass(frozen=True)
class Swap:
    """One refresh. resident: units in force from now on; fetched, evicted: units; bytes: moved to the device; late:
    the fetch of the last window is still under way, so the old set stays and nothing was planned; alone: the fetch
    ran by itself because both sets together had no room, or because there was no set before."""

    resident: int
    fetched: int = 0
    evicted: int = 0
    bytes: int = 0
    late: bool = False
    alone: bool = False


class Residency:
    """One sequence's history: all of it in `cold`, the resident part in `hot`.

    lane: None fetches while decoding waits (lag 0: a wanted set is in force at once); a lane fetches beside it (lag 1:
    a wanted set comes into force at the next refresh, if its fetch is done by then). Slots of the set in force are
    never written while it is in force. protected, reserve: as the Planner's.
    """

    def __init__(
        self, cold: ColdPool, hot: HotPool, protected: int = 0, reserve: int = 0, lane: Lane | None = None
    ) -> None:
        self.cold = cold
        self.hot = hot
        self.table = SlotTable(hot.capacity)
        self.planner = Planner(self.table, protected, reserve)
        self.table.grow(cold.units)
        self._copy = best_copy(cold, hot)
        self._lane = lane
        self._ticket: Ticket | None = None
        self._admitted: list[np.ndarray] = []  # since the open plan
        self._enforce(np.empty(0, dtype=np.int32))

    def append(self, data: torch.Tensor) -> None:
        """History that was read before decoding, [n, *shape]: cold only."""
        self.cold.append(data)
        self.table.grow(data.shape[0])

    def admit(self, data: torch.Tensor) -> None:
        """Units made while decoding, [n, *shape]: cold, and resident in the set in force and in the next one.

        Raises InputError when no slot can be had in this window: see the planner's reserve.
        """
        self.cold.check(data)
        self.cold.reserve(data.shape[0])
        units, slots = self.planner.admit(data.shape[0])
        self.cold.append(data)
        self.hot.slots[torch.from_numpy(slots).long().to(self.hot.device)] = data.to(self.hot.device)
        if self._ticket is not None:
            self._admitted.append(units)
        self._enforce(np.concatenate([self.resident.units, units]))

    def write(self, unit: int, place: tuple[int | slice, ...], data: torch.Tensor) -> None:
        """unit[place] = data on both sides, for a unit on the device: the newest page fills up chunk after chunk.

        Raises InputError when the unit is not on the device.
        """
        slot = int(self.table.slots(np.array([unit]))[0])
        self.hot.slots[slot][place].copy_(data)
        self.cold[unit][place].copy_(data, non_blocking=self.cold.pinned)

    def refresh(self, wanted: np.ndarray) -> Swap:
        """At the start of a window: towards `wanted`, [R] ascending units. Raises InputError when it does not fit."""
        if self._ticket is not None:
            # A late fetch may continue as long as there is room for the units of another window.
            if not self._ticket.done() and self.planner.room() >= self.planner.reserve:
                return Swap(self.resident.units.size, late=True)
            self._take(self._ticket)
        lane = self._lane if self.resident.units.size else None
        beside = None if lane is None else self._plan_beside(wanted)
        plan = beside or self.planner.plan(wanted)
        work = (self.cold, plan.fetch_units, self.hot, plan.fetch_slots)
        if lane is not None and beside is not None:
            self._ticket = lane.submit(self._copy, *work)
        else:
            self._copy(*work)
            self._enforce(self.planner.finish().wanted)
        fetched = plan.fetch_units.size
        return Swap(
            self.resident.units.size,
            fetched,
            plan.evict_units.size,
            fetched * self.cold.layout.stride,
            alone=beside is None and self._lane is not None,
        )

    def _plan_beside(self, wanted: np.ndarray) -> FetchPlan | None:
        try:
            return self.planner.plan(wanted, overlap=True)
        except InputError:  # no room for both sets; planning without the old one finds every other fault again
            return None

    def _take(self, ticket: Ticket) -> None:
        """The next set comes into force, with the units that were made since it was planned."""
        ticket.result()
        wanted = self.planner.finish().wanted
        self._ticket = None
        self._enforce(np.concatenate([wanted, *self._admitted]))
        self._admitted = []

    def _enforce(self, units: np.ndarray) -> None:
        slots = torch.from_numpy(self.table.slots(units))
        self.resident = InForce(units, slots.to(self.hot.device, non_blocking=True))
