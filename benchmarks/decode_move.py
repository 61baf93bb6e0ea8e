"""Benchmark rows of what moves between the pools: fetching and planning."""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.timing import Hardware, Row, host_microseconds, microseconds, require
from data_gen.core.key_bytes import PAGE
from eval.serving.pools import ColdPool, Copy, HotPool, gather_copies, index_copy, unit_copies
from eval.serving.residency import Planner, SlotTable

LAYERS, KEY, ENTRY = 21, 132, 584
CHUNK_UNIT = (LAYERS, ENTRY)
PAGE_UNIT = (LAYERS, PAGE * (KEY + ENTRY))
"""Keys and entries of all CSA layers: Level 2 and attention read them where they land."""


def fetch_rows(
    device: torch.device, machine: Hardware, pages: tuple[int, ...], chunks: tuple[int, ...]
) -> Iterator[Row]:
    """Pages and single chunks from host memory into scattered slots, by every way that this machine has."""
    copies: dict[str, Copy] = {"unit copies": unit_copies}
    if device.type == "cuda" and find_spec("triton"):
        copies["gather kernel"] = gather_copies
    if device.type == "cpu":
        copies["index copy"] = index_copy
    for name, shape, counts in (("pages", PAGE_UNIT, pages), ("chunks", CHUNK_UNIT, chunks)):
        cold = ColdPool(shape, torch.uint8)
        cold.append(torch.randint(0, 256, (max(counts), *shape), dtype=torch.uint8))
        hot = HotPool(max(counts), shape, torch.uint8, device)
        random = np.random.default_rng(0)
        for count in counts:
            units = np.sort(random.permutation(cold.units)[:count]).astype(np.int32)
            slots = random.permutation(hot.capacity)[:count].astype(np.int32)
            moved = count * cold.layout.stride
            for backend, copy in copies.items():
                hot.storage.zero_()
                copy(cold, units, hot, slots)
                for unit, slot in zip(units.tolist(), slots.tolist(), strict=True):
                    require(torch.equal(hot.slots[slot].cpu(), cold[unit]), f"fetch by {backend}")
                us = microseconds(partial(copy, cold, units, hot, slots), device)
                stage = f"fetch {moved / 1e6:.0f} MB, {count} {name} of {cold.layout.stride / 1e3:.0f} KB"
                yield Row(stage, backend, us, moved, moved / machine.link)


def planner_rows(units: int, resident: int) -> Iterator[Row]:
    """Planning alone: a quarter of the resident units changes every window."""
    random = np.random.default_rng(0)
    planner = Planner(SlotTable(2 * resident), reserve=16)
    planner.table.grow(units)
    wanted = [np.sort(random.permutation(units)[:resident])]
    for _ in range(20):
        kept = random.permutation(wanted[-1])[: resident * 3 // 4]
        others = np.setdiff1d(np.arange(units), wanted[-1])
        wanted.append(np.sort(np.concatenate([kept, random.permutation(others)[: resident - kept.size]])))
    windows = iter(wanted)

    def window() -> None:
        planner.plan(next(windows), overlap=True)
        planner.finish()

    us = host_microseconds(window, len(wanted))
    require(bool((planner.table.slot_of[wanted[-1]] >= 0).all()), "planner")
    yield Row(f"planner, {resident} of {units} units, 25 % new", "numpy", us)
