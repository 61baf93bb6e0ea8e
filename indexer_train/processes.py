"""Training on several processes, as `torchrun` starts them."""

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """Number of this process; the first one writes."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def average(gradient: torch.Tensor) -> torch.Tensor:
    """Mean of a gradient over the processes, for parameters outside of the wrapped model."""
    if count() > 1:
        dist.all_reduce(gradient)
        gradient /= count()
    return gradient
