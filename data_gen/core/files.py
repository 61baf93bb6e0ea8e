"""Files: written whole or not at all, read whole or refused in one line; where installed packages lie."""

import importlib.util
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_gen.core.errors import InputError

READING = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What readers of JSON, of settings and of tensors raise when a file is cut short, edited or another one."""


@contextmanager
def whole(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Whatever reading `path` raises becomes the InputError `PATH: damaged WHAT (why); REMEDY`."""
    try:
        yield
    except READING as error:
        raise InputError(f"{path}: damaged {what} ({one_line(error)}); {remedy}") from error


def one_line(error: Exception) -> str:
    """One line of an error that a reader raised."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, flush it to disk, then give it its name: a killed run leaves no half."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file whose bytes are a function of what it holds: the library writes metadata in any order."""
    save_file(dict(tensors), path, dict(metadata))
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(ordered) != size:
            raise InputError(f"{path}: its header cannot be put in order: this safetensors writes it otherwise")
        file.seek(8)
        file.write(ordered)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of names and bytes in the order of the names, as eight hexadecimal digits."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def package_folder(name: str, what: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises InputError, which begins with `what` asked for it, when there is none.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # of a package that the name would lie in; no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{what}: the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])
