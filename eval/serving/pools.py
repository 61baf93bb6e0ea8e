"""Where units live: all of them cold in host memory, some of them hot on the device."""

import copy
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from data_gen.core.errors import InputError

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

    Grows by whole segments, each as large as all before it up to `segment_bytes`: nothing that is there ever moves, and
    a short history takes little. Pinned (and then readable by the device itself) unless `pageable`; None asks for
    pinned memory where there is a CUDA device. Raises InputError when the machine cannot pin more.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        pageable: bool | None = None,
        segment_bytes: int = 1 << 28,  # the pinned allocator rounds up to powers of two
    ) -> None:
        self.layout = UnitLayout(shape, dtype)
        self.pinned = torch.cuda.is_available() if pageable is None else not pageable
        self._most, self._least = (max(1, size // self.layout.stride) for size in (segment_bytes, FIRST_BYTES))
        self.segments: list[torch.Tensor] = []
        self.starts: list[int] = []
        """Each segment's first unit."""
        self.units = 0

    def append(self, data: torch.Tensor) -> None:
        """Store new units [n, *shape] behind the others; from a device into pinned memory without waiting."""
        self.check(data)
        self.reserve(data.shape[0])
        while data.shape[0]:
            segment, row = self.locate(self.units)
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
        """A pool that goes on from the same units. Full segments serve both: their units must not be written again."""
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

    def locate(self, units: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(segment, row in it) of units."""
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
        segment, row = self.locate(int(unit))
        return self.segments[segment][row]

    def __getitem__(self, unit: int) -> torch.Tensor:
        """One unit, [*shape]: the memory itself, to read or to write."""
        return self.layout.view(self.storage(unit)[None])[0]

    def addresses(self, units: np.ndarray) -> torch.Tensor:
        """Where units start in host memory, [n] int64."""
        bases = np.array([segment.data_ptr() for segment in self.segments], dtype=np.int64)
        segment, row = self.locate(np.asarray(units, dtype=np.int64))
        return torch.from_numpy(bases[segment] + row * self.layout.stride)

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
        return self.storage.shape[0]

    @property
    def device(self) -> torch.device:
        return self.storage.device
