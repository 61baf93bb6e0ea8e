"""A GPU for machines without one: tensors that say they are there, and an error wherever host and device are mixed.

Values are computed on the CPU. What a GPU takes of the host, numbers without dimensions and indices, is taken here too.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)


class MixedDevicesError(Exception):
    """An operation on tensors of both devices, or NumPy on one of the GPU's."""


def there(value: torch.Tensor) -> bool:
    """Whether a tensor says that it is on the GPU."""
    return getattr(value, "_there", False)


def bring(value: Any) -> Any:
    """Mark tensors, in whatever holds them, as the GPU's."""
    for each in _tensors(value):
        each._there = True
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in _tensors(part)] if isinstance(value, list | tuple) else []


class SecondDevice(TorchFunctionMode):
    """While it is entered, `device=cuda` and `.to("cuda")` work, and what they make is kept apart."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__ and there(args[0]):
            return GPU
        if function in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return there(args[0]) == (function == torch.Tensor.is_cuda.__get__)
        if function == torch.Tensor.pin_memory:
            return args[0]
        if function == torch.Tensor.numpy and there(args[0]):
            raise MixedDevicesError("NumPy reads the host's memory alone")
        if function == torch.Tensor.cpu:
            return self._moved(args[0], False)
        if function == torch.Tensor.to:
            return self._to(*args, **kwargs)
        device, given = kwargs.get("device"), _tensors([list(args), kwargs])
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        places = {there(each) for each in given if each.dim() or there(each)}
        if len(places) == 2 and not (name in ("__getitem__", "__setitem__") and there(args[0])) and name != "copy_":
            raise MixedDevicesError(f"{name}: {[(tuple(each.shape), there(each)) for each in given]}")
        found = function(*args, **kwargs)
        here = torch.device(device).type == "cpu" if device is not None else True not in places
        return found if here else bring(found)

    def _to(self, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("non_blocking", None)
        named = bool(args) and (args[0] is None or isinstance(args[0], torch.device | str))
        device = args[0] if named else kwargs.pop("device", None)
        rest = args[1:] if named else args
        place = there(value) if device is None else torch.device(device).type == "cuda"
        return self._moved(value.to(*rest, **kwargs) if rest or kwargs else value, place)

    def _moved(self, value: torch.Tensor, place: bool) -> torch.Tensor:
        if there(value) == place:
            return value
        moved = value.detach().clone()
        moved._there = place
        return moved
