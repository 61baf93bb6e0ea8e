"""What is done for the CPU alone; `python -m benchmarks.cpu_tricks` prints the gain of each, on and off in turns.

Gains noted here are of a training step (CPU time) or of an evaluation (peak memory) on an Intel Xeon at 2.80 GHz with
AVX-512, one thread, median of two rounds of 4 steps beside other work: 5 % either way says nothing.
"""

import ctypes
import os
import sys
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether products are oneDNN's: PyTorch's default library leaves AVX-512 unused on AMD processors, and half of their
speed with it. On processors without it the default library is a little faster, and so it is on that Intel: 0.87x."""
CACHE_ELEMENTS = 1 << 18
"""Matches of queries and keys held in the CPU's cache at once (1 MiB in fp32)."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Let glibc reuse blocks of up to 32 MiB (its largest bound) instead of giving them back; elsewhere do nothing.

    1.16x.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Let glibc give blocks of 8 MiB and more back at once, as it does not when such blocks came and went before: heaps
    of large blocks in changing sizes grow by gigabytes. Elsewhere do nothing.

    1.36x less memory (1.22 GiB, not 1.66) in evaluating documents of 98,304 chunks.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 8 << 20)


def ask_for_huge_pages() -> None:
    """Let torch ask the kernel for huge pages, unless the environment says otherwise; before torch first allocates.

    Training makes every gradient anew, and the kernel clears each new page: 1.08x.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once and has no other switch


def product(x: torch.Tensor, weight: torch.Tensor, relu: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T, negative values set to zero if asked. x: [M, K]; weight: [N, K]. Returns [M, N].

    out: [M, N], memory that may be used for the result: a loop need not ask the system for more each time.
    """
    if ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel():  # it refuses empty sums
        found = torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), None, "none", [], "")
    else:
        found = torch.mm(x, weight.T, out=out)
    return found.relu_() if relu else found  # oneDNN's own turns NaN into zero


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """Rows (or columns) with gaps between them would be multiplied by a slow reference kernel."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class SteadyLinear(nn.Linear):
    """nn.Linear without bias whose weight's gradient lies in the same memory in every step (in fp32 on the CPU).

    Whoever keeps a gradient beyond `zero_grad` must copy it. 1.03x beside the other tricks, which is noise.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.memory: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        plain = input.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not self.weight.requires_grad
        return super().forward(input) if plain or input.ndim != 2 else _Product.apply(input, self.weight, self)


class _Product(torch.autograd.Function):
    """x W^T; the gradient of W goes to the layer's memory unless an earlier one is still there to be added to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: SteadyLinear) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return product(x, weight)

    @staticmethod
    @once_differentiable  # loses the name of its first parameter, which the base class has
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        inner = product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        if weight.grad is not None:
            return inner, product(gradient.T, x.T), None
        if ctx.layer.memory is None:
            ctx.layer.memory = torch.empty_like(weight)
        own = ctx.layer.memory.detach()  # a tensor of its own: autograd takes it as the gradient without a copy
        few = max(1, CACHE_ELEMENTS // own.shape[1])  # rows that stay in the cache between the product and the copy
        columns = x.contiguous().T
        for place, part in zip(own.split(few), gradient.split(few, dim=1), strict=True):
            place.copy_(product(part.contiguous().T, columns, out=place))  # no copy where it is made in place
        return inner, own, None
