"""Where units live, cold in host memory or hot on the device, and how they get from the one to the other.

Called by both sides: `Residency`, for serving engines, and the hosts of Hugging Face models
(eval/runtime/hosts/resident.py).
"""

import copy
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any, Protocol

import numpy as np
import torch

from data_gen.core.errors import InputError
from eval.serving.kernels.device import warn_once

ALIGNMENT = 16
"""Units start at multiples of this many bytes, so that they are read and written 16 bytes at a time."""
FIRST_BYTES = 1 << 20
"""The smallest segment, unless segments are smaller altogether."""


@dataclass(frozen=True)
class UnitLayout:
    """One unit: `shape` of `dtype`, contiguous (layers innermost: one copy moves all layers), padded to 16 bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.elements < 1:
            raise InputError(f"a unit of shape {self.shape} holds nothing: give every dimension at least one element")

    @property
    def elements(self) -> int:
        """Values in one unit."""
        return prod(self.shape)

    @property
    def stride(self) -> int:
        """Bytes from one unit to the next."""
        return -(-self.elements * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def view(self, storage: torch.Tensor) -> torch.Tensor:
        """Units [n, *shape] over their bytes `storage` [n, stride] uint8; no copy."""
        return storage.view(self.dtype)[:, : self.elements].unflatten(1, self.shape)


class ColdPool:
    """Every unit of a sequence, numbered in order of arrival, in host memory.

    Grows by whole segments, each as large as all before it up to `largest`: nothing that is there ever moves, and a
    short history takes little. Pinned (and then readable by the device itself) unless `pageable`; None asks for
    pinned memory where there is a CUDA device. Raises InputError when the machine cannot pin more.
    """

    largest = 1 << 28
    """Bytes of a segment; the pinned allocator rounds up to powers of two."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pageable: bool | None = None) -> None:
        self.layout = UnitLayout(shape, dtype)
        self.pinned = torch.cuda.is_available() if pageable is None else not pageable
        self._most, self._least = (max(1, size // self.layout.stride) for size in (self.largest, FIRST_BYTES))
        self.segments: list[torch.Tensor] = []
        self.starts: list[int] = []
        """Each segment's first unit."""
        self.units = 0

    def append(self, data: torch.Tensor) -> None:
        """Store new units [n, *shape] after the others; from a device into pinned memory without waiting."""
        self.check(data)
        self.reserve(data.shape[0])
        while data.shape[0]:
            segment, row = self._place(self.units)
            count = min(data.shape[0], len(self.segments[segment]) - row)
            self.layout.view(self.segments[segment])[row : row + count].copy_(data[:count], non_blocking=self.pinned)
            self.units += count
            data = data[count:]

    def reserve(self, count: int) -> None:
        """Have memory for `count` more units, so that storing them neither waits nor fails."""
        while (room := sum(map(len, self.segments))) < self.units + count:
            wanted = max(self._least, room, self.units + count - room)
            self.segments.append(self._segment(min(wanted, self._most)))
            self.starts.append(room)

    def fork(self) -> "ColdPool":
        """A pool that continues from the same units. Full segments serve both: their units must stay as they are."""
        twin = copy.copy(self)
        full = sum(
            start + len(segment) <= self.units for start, segment in zip(self.starts, self.segments, strict=True)
        )
        twin.segments, twin.starts = self.segments[:full], self.starts[:full]
        if rest := self.units - sum(map(len, twin.segments)):
            if self.pinned:
                torch.cuda.current_stream().synchronize()  # copies from the device may be under way
            twin.segments.append(self._segment(len(self.segments[full])))
            twin.starts.append(self.starts[full])
            twin.segments[full][:rest].copy_(self.segments[full][:rest])
        return twin

    def locate(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segment, row in it) of units, [n] each."""
        segment = np.searchsorted(self.starts, units, side="right") - 1
        return segment, units - np.asarray(self.starts, dtype=np.int64)[segment]

    def check(self, data: torch.Tensor) -> None:
        """Raise InputError unless these are units [n, *shape] of this pool's kind."""
        if tuple(data.shape[1:]) != self.layout.shape or data.dtype != self.layout.dtype:
            raise InputError(
                f"units of shape {tuple(data.shape[1:])} and {data.dtype} do not fit a pool of "
                f"{self.layout.shape} and {self.layout.dtype}"
            )

    def storage(self, unit: int) -> torch.Tensor:
        """The bytes of one unit, [stride] uint8: the memory itself."""
        segment, row = self._place(int(unit))
        return self.segments[segment][row]

    def __getitem__(self, unit: int) -> torch.Tensor:
        """One unit, [*shape]: the memory itself, to read or to write."""
        return self.layout.view(self.storage(unit)[None])[0]

    def addresses(self, units: np.ndarray) -> torch.Tensor:
        """Where units start in host memory, [n] int64."""
        bases = np.array([segment.data_ptr() for segment in self.segments], dtype=np.int64)
        segment, row = self.locate(np.asarray(units, dtype=np.int64))
        return torch.from_numpy(bases[segment] + row * self.layout.stride)

    def _place(self, unit: int) -> tuple[int, int]:
        """(segment, row in it) of one unit."""
        segment = bisect_right(self.starts, unit) - 1
        return segment, unit - self.starts[segment]

    def _segment(self, units: int) -> torch.Tensor:
        try:
            return torch.empty(units, self.layout.stride, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if self.pinned else "host memory"
            advice = "ask for pageable memory (LSARuntime or ColdPool: pageable=True) or allow more (ulimit -l)"
            raise InputError(
                f"no {units * self.layout.stride / 2**20:.1f} MiB of {kind} beside the "
                f"{len(self.segments)} segments there are ({str(error).splitlines()[0]}): "
                + (advice if self.pinned else "keep shorter histories, or add memory")
            ) from error


class HotPool:
    """A fixed number of slots on the device, each for one unit. slots: [capacity, *shape]."""

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        self.layout = UnitLayout(shape, dtype)
        self.storage = torch.zeros(capacity, self.layout.stride, dtype=torch.uint8, device=device)
        self.slots = self.layout.view(self.storage)

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self.storage.shape[0]

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.storage.device


Copy = Callable[[ColdPool, np.ndarray, HotPool, np.ndarray], None]
"""(cold, units [n], hot, slots [n]): unit i of the cold pool into slot i of the hot one, on the current stream."""


def index_copy(cold: ColdPool, units: np.ndarray, hot: HotPool, slots: np.ndarray) -> None:
    """The reference: one indexed copy a segment, in words of eight bytes; waits for the device, if there is one.

    units, slots: [n], as of `Copy`.
    """
    target = hot.storage.view(torch.int64)
    segment, row = cold.locate(np.asarray(units, dtype=np.int64))
    for number in np.unique(segment):
        here = segment == number
        data = cold.segments[number].view(torch.int64).index_select(0, torch.from_numpy(row[here]))
        target.index_copy_(0, torch.from_numpy(slots[here].astype(np.int64)).to(hot.device), data.to(hot.device))


def unit_copies(cold: ColdPool, units: np.ndarray, hot: HotPool, slots: np.ndarray) -> None:
    """One copy a unit ([n], as of `Copy`), by the copy engine where the cold pool is pinned: slow for chunks."""
    for unit, slot in zip(units.tolist(), slots.tolist(), strict=True):
        hot.storage[slot].copy_(cold.storage(unit), non_blocking=cold.pinned)


def gather_copies(cold: ColdPool, units: np.ndarray, hot: HotPool, slots: np.ndarray) -> None:
    """The Triton kernel: the device itself reads pinned host memory. units, slots: [n], as of `Copy`.

    Raises InputError for a pageable pool.
    """
    from eval.serving.kernels.gather import gather

    if not cold.pinned:
        raise InputError("the gather kernel reads pinned memory: this cold pool is pageable, use unit_copies")
    sources = cold.addresses(units).pin_memory().to(hot.device, non_blocking=True)
    targets = torch.from_numpy(slots.astype(np.int32)).pin_memory().to(hot.device, non_blocking=True)
    gather(sources, targets, hot.storage)


def best_copy(cold: ColdPool, hot: HotPool) -> Copy:
    """The fastest way that this machine has; on a GPU a warning is logged where that is not the Triton kernel.

    Raises InputError when the pools hold different units.
    """
    if cold.layout != hot.layout:
        raise InputError(f"the cold pool holds {cold.layout}, the hot one {hot.layout}: give both the same units")
    if hot.device.type != "cuda":
        return index_copy
    if cold.pinned and find_spec("triton"):
        return gather_copies
    lacking = "triton, which is not installed (pip install triton)" if cold.pinned else "a pinned cold pool"
    warn_once(f"units are fetched one by one, which is slow for chunks: the gather kernel needs {lacking}")
    return unit_copies


class Ticket(Protocol):
    """Work under way. `result` is what it returned, or raises what it raised; what follows comes after the work."""

    def done(self) -> bool:
        """Whether `result` would not wait."""
        ...

    def result(self) -> Any:
        """What the work returned, once it is done."""
        ...


class Lane(Protocol):
    """Runs work beside the decoding: a SideStream on a device, a ThreadPoolExecutor on a CPU."""

    def submit(self, work: Callable[..., Any], /, *args: Any) -> Ticket:
        """Begin `work(*args)` when everything asked for before is done."""
        ...


class SideStream:
    """A CUDA stream beside the current one; its work starts after everything that was queued before it.

    Memory that the work allocates is the side stream's: it may be dropped at any time, for it is given out again only
    to later work, which waits for whatever the current stream still reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[..., Any], /, *args: Any) -> "StreamTicket":
        """Queue `work(*args)` behind what the current stream holds now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            value = work(*args)
        event = torch.cuda.Event()
        event.record(self._stream)
        return StreamTicket(event, self._stream.device, value)


@dataclass(frozen=True)
class StreamTicket:
    """Done when the device has passed `event`."""

    event: torch.cuda.Event
    device: torch.device
    value: Any

    def done(self) -> bool:
        """Whether the device has passed the event; waits for nothing."""
        return self.event.query()

    def result(self) -> Any:
        """The value; what the current stream does from now on comes behind the event, and the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(self.event)
        return self.value


def side_lane(device: torch.device) -> Lane:
    """The lane for overlapped fetches into pools on this device."""
    return SideStream(device) if device.type == "cuda" else ThreadPoolExecutor(max_workers=1)
