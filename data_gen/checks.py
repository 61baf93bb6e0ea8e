"""Checks of values on whatever device they lie."""

from collections.abc import Callable

import torch

from data_gen.errors import InputError


def require(holds: torch.Tensor, message: Callable[[], str]) -> None:
    """Raise InputError unless all of `holds` (bool) is true; the message is made only then.

    A GPU is not waited for: there the assertion fails on the device, and the program at its next wait.
    """
    if not holds.is_cpu:
        torch._assert_async(holds.all(), "a check of values failed on the device; on the CPU it says which")
    elif not bool(holds.all()):
        raise InputError(message())
