"""Times on the device at hand, what that device could do at best, and where figures come from."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

MEMORY_GBPS = {"H200": 4800, "H100 PCIe": 2039, "H100": 3350, "A100": 2039, "L40S": 864, "RTX 4090": 1008}
"""Device memory by name, as the makers give it, in GB/s. Any other device: a measured copy."""
CALLS = 20
"""Calls in one CUDA graph: a kernel of 10 us is shorter than its launch from Python."""


@dataclass(frozen=True)
class Hardware:
    """Bytes a microsecond. memory: of the device; link: host to device, measured; source: where memory is from."""

    memory: float
    link: float
    source: str


@dataclass(frozen=True)
class Row:
    """One figure. us: microseconds a call; bytes: that it must move; limit_us: those bytes at the hardware's rate."""

    stage: str
    backend: str
    us: float
    bytes: int | None = None
    limit_us: float | None = None

    def line(self) -> str:
        """As a row of a Markdown table; no share of a limit that the hardware's caches beat."""
        start = f"| {self.stage} | {self.backend} | {self.us:.1f} us |"
        if self.bytes is None or self.limit_us is None:
            return f"{start} - | - | - |"
        rate = self.bytes / self.us / 1e3
        share = f"{self.limit_us / self.us:.0%}" if self.limit_us <= self.us else "-"
        return f"{start} {rate:.1f} GB/s | {self.limit_us:.1f} us | {share} |"


class WrongResultError(Exception):
    """A stage's result is not that of its reference: it has no speed."""


def require(right: bool, what: str) -> None:
    """Raise WrongResultError unless `right`."""
    if not right:
        raise WrongResultError(what)


def check_output(path: Path) -> None:
    """End with one line, before anything is measured, when figures could not be written there."""
    if path.is_dir() or not path.parent.is_dir():
        raise SystemExit(f"--output {path}: {'a folder' if path.is_dir() else 'its folder is missing'}; name a file")


def hardware(device: torch.device, copy_bytes: int) -> Hardware:
    """Measure one large copy from (pinned) host memory, and the device's memory unless its name is known."""
    pinned = device.type == "cuda"
    host = torch.zeros(copy_bytes, dtype=torch.uint8, pin_memory=pinned)
    target = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    link = copy_bytes / microseconds(lambda: target.copy_(host, non_blocking=True), device)
    name = torch.cuda.get_device_name(device) if pinned else "CPU"
    for known, rate in MEMORY_GBPS.items():
        if known in name:
            return Hardware(rate * 1e3, link, f"{rate} GB/s, {name}")
    source = torch.zeros_like(target)
    rate = 2 * copy_bytes / microseconds(lambda: target.copy_(source), device)  # read and written
    return Hardware(rate, link, f"{rate / 1e3:.0f} GB/s, copy measured on {name}")


def microseconds(work: Callable[[], object], device: torch.device, graph: bool = False, rounds: int = 15) -> float:
    """Median time of a call. graph: replay captured calls, for work that never waits for the host."""
    for _ in range(min(3, rounds // 2)):
        work()
    if device.type != "cuda":
        return host_microseconds(work, rounds)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(CALLS):
                work()
        return _on_device(captured.replay, rounds) / CALLS
    return _on_device(work, rounds)


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The work as one CUDA graph, for work that never waits for the host; on a CPU the work itself."""
    if device.type != "cuda":
        return work
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> Callable[[], object]:
        graph.replay()
        return work  # which holds what the graph reads: freed memory would be read as well

    return replay


def host_microseconds(work: Callable[[], object], rounds: int) -> float:
    """Median time of a call on the host."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _on_device(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
