"""Where the Triton kernels run."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

from data_gen.core.errors import InputError

FP8_SINCE = (8, 9)
"""Compute capability from which a GPU converts fp8 (e4m3) itself; Triton compiles no such conversion below."""


def lacks(device: torch.device) -> str | None:
    """What the kernels need and do not find there, None where they run."""
    if not find_spec("triton"):
        return "triton, which is not installed (pip install triton)"
    if device.type != "cuda":
        return "a CUDA device"
    if (found := torch.cuda.get_device_capability(device)) < FP8_SINCE:
        return "compute capability {}.{} for fp8 keys, and this GPU has {}.{}".format(*FP8_SINCE, *found)
    return None


@cache
def warn_once(message: str) -> None:
    """Log a warning that something slower is done instead, each message once a process."""
    logging.getLogger(__name__).warning(message)


def check_fp8(device: torch.device) -> None:
    """Raise InputError for a GPU that is too old for the kernels that read fp8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_SINCE:
        raise InputError(f"the Triton kernels need {lacks(device)}; use the torch backend")
