"""Files that are not what they were when they were written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError

from data_gen.errors import InputError

READING = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What readers of JSON, of settings and of tensors raise when a file is cut short, edited or another one."""


@contextmanager
def whole(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Whatever reading `path` raises becomes the InputError `PATH: damaged WHAT (why); REMEDY`."""
    try:
        yield
    except READING as error:
        raise InputError(f"{path}: damaged {what} ({_reason(error)}); {remedy}") from error


def _reason(error: Exception) -> str:
    """One line of an error that a reader raised."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
