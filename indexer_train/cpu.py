"""Training on the CPU without fresh memory in every step: the kernel clears each new page, a sixth of the time."""

import ctypes
import sys
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from data_gen.core.tensors import CACHE_ELEMENTS, product

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


class SteadyLinear(nn.Linear):
    """nn.Linear without bias whose weight's gradient lies in the same memory in every step (in fp32 on the CPU).

    Whoever keeps a gradient beyond `zero_grad` must copy it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.memory: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not self.weight.requires_grad
        return super().forward(x) if plain or x.ndim != 2 else _Product.apply(x, self.weight, self)


class _Product(torch.autograd.Function):
    """x W^T; the gradient of W goes to the layer's memory unless an earlier one is still there to be added to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: SteadyLinear) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
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
