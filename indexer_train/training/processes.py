"""Training on several processes, as `torchrun` starts them, and those that make batches for each of them."""

import logging
import os
import shutil

import torch
import torch.distributed as dist

WORKERS = 2
"""Processes that make batches for one GPU."""
SHARED_MEMORY = 4 << 30
"""Bytes that must be free for the batches of one GPU: Docker grants 64 MiB unless asked, and too few end the run."""

logger = logging.getLogger(__name__)


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


def workers(asked: int | None, cuda: bool) -> int:
    """How many processes make batches ahead: `asked`, or what suits the device and the memory to share."""
    if asked is not None or not cuda:
        return asked or 0
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0
    needed = SHARED_MEMORY * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # one memory for all ranks of this machine
    if free < needed:
        logger.warning(
            "/dev/shm has %d MiB free of the %d that batches made ahead need: the GPU will wait for its batches; "
            "train.workers: %d insists",
            free >> 20,
            needed >> 20,
            WORKERS,
        )
        return 0
    return WORKERS
