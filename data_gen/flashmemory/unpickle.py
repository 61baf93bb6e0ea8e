"""Read a dump, a pickle of tensors, without running anything that it brings along."""

import collections
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_gen.core.errors import InputError

LARGE = 4096
"""Bytes above which a byte string is tensor data, which nothing refers back to."""


def load_dump(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a dump by name, of any shapes.

    Only the three globals that pickled tensors need are allowed; any other is refused by name. Peak memory is the
    document and its largest tensor twice. Raises InputError (without the path) when the file is no dump, is damaged, or
    asks for more.
    """
    try:
        with open(path, "rb") as file:
            found = _TensorUnpickler(file).load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # damaged bytes can end in any exception of the pickle machine or of torch
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"damaged dump ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError("not a dump (it holds no dictionary of named tensors)")
    if others := sorted(name for name, value in found.items() if not isinstance(value, torch.Tensor)):
        raise InputError(f"not a dump ({others[0]} is no tensor)")
    return {name: value.detach() for name, value in found.items()}


def _storage(data: bytes) -> Any:
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(found, torch.TypedStorage) or found._untyped_storage.nbytes() > len(data):
        raise InputError("damaged dump (a storage holds more than its bytes, or is none)")
    return found


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *settings: Any) -> torch.Tensor:
    """What _rebuild_tensor_v2 makes of a whole tensor; that one grows a storage which is too small, with noise."""
    held, numel = storage._untyped_storage.nbytes() // storage.dtype.itemsize, math.prod(size)
    if min(offset, *size, 0) < 0 or offset + numel > held:
        raise InputError(f"damaged dump (a tensor {list(size)} from element {offset} on, of {held} that are stored)")
    empty: Any = torch.empty(0, dtype=storage.dtype)  # no stub knows this form of set_
    found = empty.set_(storage._untyped_storage, offset, size)
    others = [step for step, own, count in zip(stride, found.stride(), size, strict=True) if count > 1 and step != own]
    if (numel and others) or any(settings[2:]):  # the latter: bits such as a lazy minus sign
        raise InputError(f"damaged dump (a tensor {list(size)} with strides {list(stride)} is a view of another)")
    return found


ALLOWED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class _TensorUnpickler(pickle._Unpickler):
    """The standard library's unpickler written in Python: a dump has few, large objects.

    Unlike the one in C it lets us drop tensor bytes from its memo, which would otherwise hold the document twice.
    """

    stack: list[Any]
    memo: dict[int, Any]
    dispatch: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # noqa: RUF012 - the attribute that the base class reads

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in ALLOWED:
            raise InputError(f"refused: it asks for {module}.{name}, which tensors do not need")
        return ALLOWED[module, name]

    def load_memoize(self) -> None:
        value = self.stack[-1]
        data = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        self.memo[len(self.memo)] = None if isinstance(data, bytes) and len(data) > LARGE else value

    dispatch[pickle.MEMOIZE[0]] = load_memoize

    def load_build(self) -> None:
        raise InputError("refused: it sets attributes of objects, which tensors do not need")

    dispatch[pickle.BUILD[0]] = load_build
