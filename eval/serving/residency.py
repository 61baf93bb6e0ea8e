"""What is resident, window after window: pools, table, planner and fetch behind one object.

For a serving engine, whose paged kernels read slots in any order, so that what stays resident never moves. The hosts of
Hugging Face models keep their rows compact and in the order of chunks instead (hosts/resident.py), because stock
attention reads contiguous tensors; they share the cold pool and the fetch with this, not the table.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from data_gen.core.errors import InputError
from eval.serving.fetch import best_move
from eval.serving.planner import Plan, Planner
from eval.serving.pools import ColdPool, HotPool
from eval.serving.table import Table


class Ticket(Protocol):
    """Work under way. `result` is what it returned, or raises what it raised; what follows comes after the work."""

    def done(self) -> bool: ...

    def result(self) -> Any: ...


class Lane(Protocol):
    """Runs work beside the decoding: a SideStream on a device, a ThreadPoolExecutor on a CPU."""

    def submit(self, work: Callable[..., Any], /, *args: Any) -> Ticket: ...


class SideStream:
    """A CUDA stream beside the current one; its work starts after everything that was queued before it.

    Memory that the work allocates is the side stream's: it may be dropped at any time, for it is given out again only
    to later work, which waits for whatever the current stream still reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[..., Any], /, *args: Any) -> "StreamTicket":
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            value = work(*args)
        return StreamTicket(self._stream.record_event(), self._stream.device, value)


@dataclass(frozen=True)
class StreamTicket:
    """Done when the device has passed `event`."""

    event: torch.cuda.Event
    device: torch.device
    value: Any

    def done(self) -> bool:
        return self.event.query()

    def result(self) -> Any:
        torch.cuda.current_stream(self.device).wait_event(self.event)
        return self.value


def side_lane(device: torch.device) -> Lane:
    """The lane for overlapped fetches into pools on this device."""
    return SideStream(device) if device.type == "cuda" else ThreadPoolExecutor(max_workers=1)


@dataclass(frozen=True)
class InForce:
    """The set in force. units: [R] int32, ascending; slots: [R] int32 on the device, where each can be read."""

    units: np.ndarray
    slots: torch.Tensor


@dataclass(frozen=True)
class Window:
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
        self.table = Table(hot.capacity)
        self.planner = Planner(self.table, protected, reserve)
        self.table.grow(cold.units)
        self._move = best_move(cold, hot)
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

    def refresh(self, wanted: np.ndarray) -> Window:
        """At the start of a window: towards `wanted`, ascending units. Raises InputError when it does not fit."""
        if self._ticket is not None:
            # A late fetch may go on as long as there is room for the units of another window.
            if not self._ticket.done() and self.planner.room() >= self.planner.reserve:
                return Window(self.resident.units.size, late=True)
            self._take()
        plan = self._plan_beside(wanted) if self._lane is not None and self.resident.units.size else None
        alone = plan is None
        if plan is None:
            plan = self.planner.plan(wanted)
        work = (self.cold, plan.fetch_units, self.hot, plan.fetch_slots)
        if alone:
            self._move(*work)
            self.planner.finish()
            self._enforce(plan.wanted)
        else:
            self._ticket = self._lane.submit(self._move, *work)
        fetched = plan.fetch_units.size
        return Window(
            self.resident.units.size,
            fetched,
            plan.evict_units.size,
            fetched * self.cold.layout.stride,
            alone=alone and self._lane is not None,
        )

    def _plan_beside(self, wanted: np.ndarray) -> Plan | None:
        try:
            return self.planner.plan(wanted, overlap=True)
        except InputError:  # no room for both sets; planning without the old one finds every other fault again
            return None

    def _take(self) -> None:
        """The next set comes into force, with the units that were made since it was planned."""
        self._ticket.result()
        wanted = self.planner.open.wanted
        self.planner.finish()
        self._ticket = None
        self._enforce(np.concatenate([wanted, *self._admitted]))
        self._admitted = []

    def _enforce(self, units: np.ndarray) -> None:
        slots = torch.from_numpy(self.table.slots(units))
        self.resident = InForce(units, slots.to(self.hot.device, non_blocking=True))
