"""Every stage of the decode runtime: is it right, how long does it take, and what would the hardware allow?

    python -m benchmarks.decode [--output decode.json] [--toy]

On a CUDA machine: DeepSeek-V4-Flash's sizes, the Triton kernels (torch where Triton is missing or the GPU is older than
fp8), under four minutes. Without one, or with --toy: small sizes; on a CPU the torch backends. Each stage is compared
with its reference before it is timed; one that is wrong or breaks is named, the others go on, and the exit status is 1.
`limit` is the time in which the hardware moves the stage's bytes once: device memory by the maker's figure (or a
measured copy), the host link by one large measured copy; on a CPU what lies in its caches can beat both, and the share
is left out. Kernels are timed inside CUDA graphs, on data that may lie in the L2 cache; fetches and the planner as a
caller sees them.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.decode_levels import attention_rows, level1_rows, level2_rows, make_indexer, projection_rows
from benchmarks.decode_move import fetch_rows, planner_rows
from benchmarks.machine import origin
from benchmarks.timing import Hardware, Row, check_output, hardware


@dataclass(frozen=True)
class Sizes:
    """What is measured. histories, batches: of Level 1, with indexer (heads, hidden, rank); resident: chunks of one
    sequence; heads, k, window: of Level 2 and attention; sequences: of attention; pages, chunks: to fetch."""

    histories: tuple[int, ...] = (16_384, 65_536, 262_144)
    batches: tuple[int, ...] = (1, 8)
    indexer: tuple[int, int, int] = (128, 4096, 2048)
    resident: int = 24_576
    heads: int = 64
    k: int = 512
    window: int = 128
    sequences: tuple[int, ...] = (1, 8, 32)
    pages: tuple[int, ...] = (16, 80, 322)
    chunks: tuple[int, ...] = (6144,)
    copy_bytes: int = 1 << 28


TOY = Sizes((512, 2048), (1, 2), (16, 64, 32), 1024, 16, 64, 16, (1, 2), (2, 4), (64,), 1 << 24)


def stages(device: torch.device, sizes: Sizes, machine: Hardware) -> dict[str, Iterable[Row]]:
    """All figures by stage, in the order of a decode window; measured as they are read."""
    indexer = make_indexer(*sizes.indexer, device)
    return {
        "Level-1 queries": projection_rows(indexer, machine),
        "Level 1": level1_rows(indexer, machine, sizes.histories, sizes.batches, sizes.resident),
        "planner": planner_rows(sizes.histories[-1], sizes.resident),
        "fetch": fetch_rows(device, machine, sizes.pages, sizes.chunks),
        "Level 2": level2_rows(device, machine, sizes.resident, sizes.heads, sizes.k),
        "attention": attention_rows(device, machine, sizes.sequences, sizes.heads, sizes.k, sizes.window),
    }


def measure(device: torch.device, sizes: Sizes, output: Path | None) -> list[str]:
    """Print all rows, and keep them in `output` as they come; returns what failed."""
    started = time.perf_counter()
    machine = hardware(device, sizes.copy_bytes)
    print(f"memory {machine.source}; host link {machine.link / 1e3:.1f} GB/s, measured; torch {torch.__version__}")
    print("| stage | backend | time | rate | limit | of limit |\n|---|---|---|---|---|---|")
    done, failed = [], []
    for name, rows in stages(device, sizes, machine).items():
        try:
            for row in rows:
                print(row.line(), flush=True)
                done.append(asdict(row))
        except Exception as error:  # a kernel that does not even compile costs its own rows only
            failed.append(f"{name}: {type(error).__name__}: {error}")
        if output:
            report = origin(device) | {"wall_seconds": round(time.perf_counter() - started, 1)}
            report |= {"machine": asdict(machine), "sizes": asdict(sizes), "rows": done, "failed": failed}
            output.write_text(json.dumps(report, indent=1) + "\n")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--toy", action="store_true", help="small sizes; the default without a CUDA device")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if args.output:
        check_output(args.output)
    failed = measure(device, TOY if args.toy or device.type == "cpu" else Sizes(), args.output)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
