"""Moving units from the cold pool into slots of the hot pool: a reference, plain copies, and the gather kernel."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from data_gen.core.errors import InputError
from eval.serving.pools import ColdPool, HotPool

Move = Callable[[ColdPool, np.ndarray, HotPool, np.ndarray], None]
"""(cold, units [n], hot, slots [n]): unit i of the cold pool into slot i of the hot one, on the current stream."""


def index_copy(cold: ColdPool, units: np.ndarray, hot: HotPool, slots: np.ndarray) -> None:
    """The reference: one indexed copy a segment, in words of eight bytes; waits for the device, if there is one."""
    target = hot.storage.view(torch.int64)
    segment, row = cold.locate(np.asarray(units, dtype=np.int64))
    for number in np.unique(segment):
        here = segment == number
        data = cold.segments[number].view(torch.int64).index_select(0, torch.from_numpy(row[here]))
        target.index_copy_(0, torch.from_numpy(slots[here].astype(np.int64)).to(hot.device), data.to(hot.device))


def unit_copies(cold: ColdPool, units: np.ndarray, hot: HotPool, slots: np.ndarray) -> None:
    """One copy a unit, by the copy engine where the cold pool is pinned: good for pages, slow for chunks."""
    for unit, slot in zip(units.tolist(), slots.tolist(), strict=True):
        hot.storage[slot].copy_(cold.storage(unit), non_blocking=cold.pinned)


def gather_copies(cold: ColdPool, units: np.ndarray, hot: HotPool, slots: np.ndarray) -> None:
    """The Triton kernel: the device itself reads pinned host memory. Raises InputError for a pageable pool."""
    from eval.serving.kernels.gather import gather

    if not cold.pinned:
        raise InputError("the gather kernel reads pinned memory: this cold pool is pageable, use unit_copies")
    sources = cold.addresses(units).pin_memory().to(hot.device, non_blocking=True)
    targets = torch.from_numpy(slots.astype(np.int32)).pin_memory().to(hot.device, non_blocking=True)
    gather(sources, targets, hot.storage)


def best_move(cold: ColdPool, hot: HotPool) -> Move:
    """The fastest way that this machine has. Raises InputError when the pools hold different units."""
    if cold.layout != hot.layout:
        raise InputError(f"the cold pool holds {cold.layout}, the hot one {hot.layout}: give both the same units")
    if hot.device.type != "cuda":
        return index_copy
    return gather_copies if cold.pinned and find_spec("triton") else unit_copies
