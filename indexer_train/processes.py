"""Training on several processes, as `torchrun` starts them, and those that make batches for each of them."""

import logging
import shutil
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils.environment import get_cpu_distributed_information

WORKERS = 2
"""Processes that make batches for one GPU."""
SHARED_MEMORY = 4 << 30
"""Bytes that must be free for the batches of one GPU: Docker grants 64 MiB unless asked, and too few end the run."""
TIMEOUT = timedelta(minutes=30)
"""How long processes wait for each other, as the stock trainer has it."""

logger = logging.getLogger(__name__)


def _state() -> PartialState:
    """What accelerate knows of the processes: the stock trainer's own group, begun here if it comes later; one process
    has none."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def rank() -> int:
    """Number of this process; the first one writes."""
    return _state().process_index


def count() -> int:
    """How many processes train together."""
    return _state().num_processes


def wait() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def average(gradient: torch.Tensor) -> torch.Tensor:
    """Mean of a gradient of any shape over the processes, for parameters outside of the wrapped model."""
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
    except OSError as error:
        logger.warning(
            "/dev/shm cannot be read (%s): the GPU will wait for its batches; train.workers: %d insists", error, WORKERS
        )
        return 0
    needed = SHARED_MEMORY * get_cpu_distributed_information().local_world_size  # one memory for all on this machine
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
