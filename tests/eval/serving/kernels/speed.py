"""What a GPU test prints: time, rate, and the share of what this card could do at best."""

from functools import cache

import torch

from benchmarks.timing import Hardware, hardware


@cache
def _machine() -> Hardware:
    return hardware(torch.device("cuda"), 1 << 28)


def speed(us: float, moved: int, link: bool = False) -> str:
    """us: microseconds in which `moved` bytes were moved, in device memory or over the host link."""
    limit, what = (_machine().link, "host link") if link else (_machine().memory, torch.cuda.get_device_name())
    return f"{us:.1f} us, {moved / us / 1e3:.1f} GB/s, {moved / us / limit:.0%} of {limit / 1e3:.0f} GB/s ({what})"
