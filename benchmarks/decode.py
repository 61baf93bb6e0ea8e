"""Every stage of the decode runtime: is it right, how long does it take, and what would the hardware allow?

    python -m benchmarks.decode [--output decode.json] [--toy]

On a CUDA machine: DeepSeek-V4-Flash's sizes, the Triton kernels, under four minutes. Without one, or with --toy: small
sizes; on a CPU the torch backends. Each row was compared with its reference before it was timed, and a wrong result
ends the run. `limit` is the time in which the hardware moves the stage's bytes once: device memory by the maker's
figure (or a measured copy), the host link by one large measured copy. Kernels are timed inside CUDA graphs, on data
that may lie in the L2 cache; fetches and the planner as a caller sees them.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import Limits, host_microseconds, limits, microseconds
from data_gen.key_codec import encode_keys, rows_to_pages
from eval.decode import level2
from eval.decode.fetch import Move, gather_copies, index_copy, unit_copies
from eval.decode.planner import Planner
from eval.decode.pools import ColdPool, HotPool
from eval.decode.table import Table

LAYERS, KEY, ENTRY, PAGE = 21, 132, 584, 64
CHUNK_UNIT = (LAYERS, ENTRY)
PAGE_UNIT = (LAYERS, PAGE * (KEY + ENTRY))


@dataclass(frozen=True)
class Sizes:
    """What is measured. resident: chunks of one sequence; heads: of Level 2; pages, chunks: to fetch; units: of the
    planner."""

    resident: int = 24_576
    heads: int = 64
    k: int = 512
    pages: tuple[int, ...] = (16, 80, 322)
    chunks: tuple[int, ...] = (6144,)
    units: int = 262_144
    copy_bytes: int = 1 << 28


TOY = Sizes(resident=1024, heads=16, k=64, pages=(2, 4), chunks=(64,), units=8192, copy_bytes=1 << 24)


@dataclass(frozen=True)
class Row:
    """One figure. us: microseconds a call; bytes: that it must move; limit_us: those bytes at the hardware's rate."""

    stage: str
    backend: str
    us: float
    bytes: int | None = None
    limit_us: float | None = None

    def line(self) -> str:
        start = f"| {self.stage} | {self.backend} | {self.us:.1f} us |"
        if self.bytes is None:
            return f"{start} - | - | - |"
        rate = self.bytes / self.us / 1e3
        return f"{start} {rate:.1f} GB/s | {self.limit_us:.1f} us | {self.limit_us / self.us:.0%} |"


def fetch_rows(device: torch.device, sizes: Sizes, bounds: Limits) -> Iterator[Row]:
    """Pages and single chunks from host memory into scattered slots, by every way that this machine has."""
    moves: dict[str, Move] = {"unit copies": unit_copies}
    if device.type == "cuda" and find_spec("triton"):
        moves["gather kernel"] = gather_copies
    if device.type == "cpu":
        moves["index copy"] = index_copy
    for name, shape, counts in (("pages", PAGE_UNIT, sizes.pages), ("chunks", CHUNK_UNIT, sizes.chunks)):
        cold = ColdPool(shape, torch.uint8)
        cold.append(torch.randint(0, 256, (max(counts), *shape), dtype=torch.uint8))
        hot = HotPool(max(counts), shape, torch.uint8, device)
        random = np.random.default_rng(0)
        for count in counts:
            units = np.sort(random.permutation(cold.units)[:count]).astype(np.int32)
            slots = random.permutation(hot.capacity)[:count].astype(np.int32)
            moved = count * cold.layout.stride
            for backend, move in moves.items():
                hot.storage.zero_()
                move(cold, units, hot, slots)
                for unit, slot in zip(units.tolist(), slots.tolist(), strict=True):
                    require(torch.equal(hot.slots[slot].cpu(), cold[unit]), f"fetch by {backend}")
                us = microseconds(partial(move, cold, units, hot, slots), device)
                stage = f"fetch {moved / 1e6:.0f} MB, {count} {name} of {cold.layout.stride / 1e3:.0f} KB"
                yield Row(stage, backend, us, moved, moved / bounds.link)


def planner_row(sizes: Sizes) -> Row:
    """Planning alone: a quarter of the resident units changes every window."""
    random = np.random.default_rng(0)
    resident = sizes.resident
    planner = Planner(Table(2 * resident), reserve=16)
    planner.table.grow(sizes.units)
    wanted = [np.sort(random.permutation(sizes.units)[:resident])]
    for _ in range(20):
        kept = random.permutation(wanted[-1])[: resident * 3 // 4]
        others = np.setdiff1d(np.arange(sizes.units), wanted[-1])
        wanted.append(np.sort(np.concatenate([kept, random.permutation(others)[: resident - kept.size]])))
    windows = iter(wanted)

    def window() -> None:
        planner.plan(next(windows), overlap=True)
        planner.finish()

    us = host_microseconds(window, len(wanted))
    require(bool((planner.table.slot_of[wanted[-1]] >= 0).all()), "planner")
    return Row(f"planner, {resident} of {sizes.units} units, 25 % new", "numpy", us)


def level2_rows(device: torch.device, sizes: Sizes, bounds: Limits) -> Iterator[Row]:
    """Native selection of one layer over the resident chunks."""
    rows = encode_keys(torch.randn(sizes.resident, KEY - 4, device=device))
    pages = rows_to_pages(rows)
    query = torch.randn(1, sizes.heads, KEY - 4, device=device)
    weights = torch.randn(1, sizes.heads, device=device) * (sizes.heads * query.shape[-1]) ** -0.5
    slots = torch.randperm(sizes.resident, dtype=torch.int32, device=device)[None]
    scores = level2.score_resident(query, weights, pages, slots)
    chosen = level2.select_resident(scores, slots, sizes.k)
    on_device = device.type == "cuda"
    name, score, select = "torch", level2.score_resident, level2.select_resident
    if on_device:
        from eval.decode.kernels.score import score_resident
        from eval.decode.kernels.topk import select_resident

        name, score, select = "triton", score_resident, select_resident
        found = score(query, weights, pages, slots)
        require(torch.allclose(found, scores, atol=2e-3 * float(scores.abs().max()), rtol=0), "Level-2 score")
        found = select(scores, slots, sizes.k)
        require(set(found[0].tolist()) == set(chosen[0].tolist()), "Level-2 selection")
    us = microseconds(partial(score, query, weights, pages, slots), device, graph=on_device)
    moved = sizes.resident * (KEY + 8)
    yield Row(f"Level-2 score, {sizes.resident} resident, H {sizes.heads}", name, us, moved, moved / bounds.memory)
    stage, moved = f"Level-2 top {sizes.k} of {sizes.resident}", sizes.resident * 4
    us = microseconds(partial(select, scores, slots, sizes.k), device, graph=on_device)
    yield Row(stage, name, us, moved, moved / bounds.memory)
    us = microseconds(partial(torch.topk, scores, sizes.k), device, graph=on_device)
    yield Row(stage, "torch.topk", us, moved, moved / bounds.memory)


def require(right: bool, what: str) -> None:
    """End the run: a wrong result has no speed."""
    if not right:
        raise SystemExit(f"wrong result: {what}")


def rows(device: torch.device, sizes: Sizes, bounds: Limits) -> Iterator[Row]:
    """All figures, in the order of a decode window."""
    yield from level2_rows(device, sizes, bounds)
    yield from fetch_rows(device, sizes, bounds)
    yield planner_row(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--toy", action="store_true", help="small sizes; the default without a CUDA device")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = TOY if args.toy or device.type == "cpu" else Sizes()
    bounds = limits(device, sizes.copy_bytes)
    print(f"memory {bounds.source}; host link {bounds.link / 1e3:.1f} GB/s, measured; torch {torch.__version__}")
    print("| stage | backend | time | rate | limit | of limit |\n|---|---|---|---|---|---|")
    done = []
    for row in rows(device, sizes, bounds):
        print(row.line(), flush=True)
        done.append(row)
    if args.output:
        report = {"limits": asdict(bounds), "sizes": asdict(sizes), "rows": [asdict(row) for row in done]}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
