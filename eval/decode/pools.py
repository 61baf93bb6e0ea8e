"""Where units live: all of them cold in host memory, some of them hot on the device."""

import copy
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from data_gen.errors import InputError

ALIGNMENT = 16
"""Units start at multiples of this many bytes, so that they are read and written 16 bytes at a time."""


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

    Grows by whole segments: nothing that is there ever moves. Pinned (and then readable by the device itself) unless
    `pageable`; None asks for pinned memory where there is a CUDA device. Raises InputError when the machine cannot
    pin more.
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
        self.segment_units = max(1, segment_bytes // self.layout.stride)
        self.segments: list[torch.Tensor] = []
        self.units = 0

    def append(self, data: torch.Tensor) -> None:
        """Store new units [n, *shape] behind the others; from a device into pinned memory without waiting."""
        self.check(data)
        self.reserve(data.shape[0])
        while data.shape[0]:
            segment, row = divmod(self.units, self.segment_units)
            count = min(data.shape[0], self.segment_units - row)
            self.layout.view(self.segments[segment])[row : row + count].copy_(data[:count], non_blocking=self.pinned)
            self.units += count
            data = data[count:]

    def reserve(self, count: int) -> None:
        """Have memory for `count` more units, so that storing them neither waits nor fails."""
        while len(self.segments) * self.segment_units < self.units + count:
            self.segments.append(self._segment())

    def fork(self) -> "ColdPool":
        """A pool that goes on from the same units. Full segments serve both: their units must not be written again."""
        twin = copy.copy(self)
        full, rest = divmod(self.units, self.segment_units)
        twin.segments = self.segments[:full]
        if rest:
            if self.pinned:
                torch.cuda.current_stream().synchronize()  # copies from the device may be under way
            twin.segments.append(self._segment())
            twin.segments[full][:rest].copy_(self.segments[full][:rest])
        return twin

    def check(self, data: torch.Tensor) -> None:
        """Raise InputError unless these are units [n, *shape] of this pool's kind."""
        if tuple(data.shape[1:]) != self.layout.shape or data.dtype != self.layout.dtype:
            raise InputError(
                f"units of shape {tuple(data.shape[1:])} and {data.dtype} do not fit a pool of "
                f"{self.layout.shape} and {self.layout.dtype}"
            )

    def storage(self, unit: int) -> torch.Tensor:
        """The bytes of one unit, [stride] uint8: the memory itself."""
        segment, row = divmod(int(unit), self.segment_units)
        return self.segments[segment][row]

    def __getitem__(self, unit: int) -> torch.Tensor:
        """One unit, [*shape]: the memory itself, to read or to write."""
        return self.layout.view(self.storage(unit)[None])[0]

    def addresses(self, units: np.ndarray) -> torch.Tensor:
        """Where units start in host memory, [n] int64."""
        bases = np.array([segment.data_ptr() for segment in self.segments], dtype=np.int64)
        segment, row = np.divmod(np.asarray(units, dtype=np.int64), self.segment_units)
        return torch.from_numpy(bases[segment] + row * self.layout.stride)

    def _segment(self) -> torch.Tensor:
        try:
            return torch.empty(self.segment_units, self.layout.stride, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if self.pinned else "host memory"
            advice = "ask for pageable memory with ColdPool(..., pageable=True), or allow more (container, ulimit -l)"
            raise InputError(
                f"no {self.segment_units * self.layout.stride / 2**20:.0f} MiB of {kind} beside the "
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
