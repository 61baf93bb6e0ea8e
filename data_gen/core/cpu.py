"""What is done for the CPU alone; `python -m benchmarks.cpu_tricks` prints the gain of each, on and off in turns.

It differs from processor to processor: what was measured is in docs/results.md.
"""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and _amd()
"""Whether products are oneDNN's: PyTorch's default library leaves AVX-512 unused on AMD processors. On Intel's it is
the faster one."""
CACHE_ELEMENTS = 1 << 18
"""Matches of queries and keys held in the CPU's cache at once (1 MiB in fp32)."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""The variable by which torch is told."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Let glibc reuse blocks of up to 32 MiB (its largest bound) instead of giving them back; elsewhere do nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Let glibc give blocks of 8 MiB and more back at once, as it does not when such blocks came and went before: heaps
    of large blocks in changing sizes grow by gigabytes. Elsewhere do nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 8 << 20)


def ask_for_huge_pages() -> None:
    """Let torch ask the kernel for huge pages, unless the environment says otherwise; before torch first allocates.

    The kernel clears each new page, and larger ones in fewer calls. torch has no other switch than a variable that it
    reads when it first allocates, so that is what happens here; nothing is left in the environment, and no child
    inherits it.
    """
    if HUGE_PAGES not in os.environ:
        os.environ[HUGE_PAGES] = "1"
        torch.empty(1)
        del os.environ[HUGE_PAGES]


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


class ProductLinear(nn.Linear):
    """nn.Linear that multiplies by `product` where no gradient is asked for."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        if torch.is_grad_enabled() or not input.is_cpu or input.dtype != torch.float32:
            return super().forward(input)
        found = product(input.reshape(-1, self.in_features), self.weight)
        return (found if self.bias is None else found.add_(self.bias)).view(*input.shape[:-1], self.out_features)


def multiply_by_product(model: nn.Module) -> None:
    """Make the stock linear layers of a model those of `product`, where that is another library than torch's own."""
    for module in model.modules() if ONEDNN else ():
        if type(module) is nn.Linear:
            module.__class__ = ProductLinear


class SteadyLinear(nn.Linear):
    """nn.Linear without bias whose weight's gradient lies in the same memory in every step (in fp32 on the CPU).

    Whoever keeps a gradient beyond `zero_grad` must copy it.
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


def processor() -> str:
    """The name of the CPU, and the widest vectors that it has of those that matter to matrix products."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.machine()
    text = information.read_text()
    named = re.search(r"model name\s*:\s*(.+)", text)
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in text), "")
    return " ".join(filter(None, [named[1] if named else platform.machine(), vectors]))
