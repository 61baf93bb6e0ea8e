"""Files: written whole or not at all, sealed by checksums, read whole or refused in one line; installed packages.

A sealed file, safetensors or JSON, holds one `"checksum"`: the SHA-256 of all of its bytes, with zeros in that place.
A sealed folder holds checksums.json, a sealed file with the SHA-256 of every other one, written last.
"""

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_gen.core.errors import InputError

CHECKSUMS = "checksums.json"
UNSEALED = {CHECKSUMS, "README.md", "calibration.json", "reliability.png"}
"""Files of a sealed folder that anybody may add or edit: nothing is computed from them."""
RESULTS = "results.json"
"""What evaluate, decode and benchmark add to."""
UNFINISHED = ".unfinished-"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BLANK = "0" * 64
SEAL = re.compile(rb'"checksum": ?"([0-9a-f]{64})"')
BLOCK = 1 << 20


@contextmanager
def whole(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Whatever a parser of `path` raises becomes the InputError `PATH: damaged WHAT (why); REMEDY`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of JSON, settings, tensors or pickles that were cut short, edited or are others
        raise InputError(f"{path}: damaged {what} ({one_line(error)}); {remedy}") from error


def one_line(error: Exception) -> str:
    """One line of an error that a reader raised."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'top level'}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first  # a heading alone says nothing


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever a library raises when the disk is full becomes one OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        told = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        code = int(told[1]) if told else code
        if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|inline_container", str(error)):
            code = errno.ENOSPC  # of torch.save, which does not say why
        if code not in FULL:
            raise
        reason = f"{os.strerror(code)}; the same command continues once there is room"
        raise OSError(code, reason, str(path)) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, flush it to disk, then give it its name: a killed run leaves no half.

    Raises OSError, with `path`, when there is no room for it.
    """
    with writing(path):
        while not _written(path, write):
            pass


def _written(path: Path, write: Callable[[Path], object]) -> bool:
    """`write_atomically` once; False where another process's `sweep` took the file before it was locked, or after a
    library had written it anew in its place, which takes the lock away."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED, suffix=path.suffix)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # for as long as this process lives, see `sweep`
        if not os.fstat(handle).st_nlink:
            return False
        write(Path(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        return True
    except FileNotFoundError:
        if Path(temporary).exists():
            raise
        return False
    finally:
        os.close(handle)
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time, for work that any of them may do for all; the folder is made if there is none.

    On a file system without locks several do it at once: it must come to the same bytes, whoever is last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{UNFINISHED}lock"
    with _locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> BinaryIO:
    """A file, made and locked. One that its last holder removed keeps nobody out: then it is made anew."""
    while True:
        file = open(path, "wb")  # noqa: SIM115 - whoever asked closes it
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`; files that somebody writes just now stay."""
    for path in folder.glob(f"{UNFINISHED}*"):
        # It has its name now, somebody holds it, or nobody can tell. NFS locks only what is open for writing.
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A sealed safetensors file of tensors of any shapes, whose bytes are a function of what it holds.

    The library itself writes metadata in any order.

    Raises OSError when there is no room for it.
    """
    with writing(path):
        save_file(dict(tensors), path, {**metadata, "checksum": BLANK})
        with open(path, "r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            if len(ordered) != size:
                raise InputError(
                    f"{path}: its header cannot be sorted, because this version of safetensors writes it differently"
                )
            file.seek(8)
            file.write(ordered)
        _seal(path)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    text = json.dumps({"checksum": BLANK, **content}, indent=2)
    write_atomically(path, lambda file: (file.write_text(text), _seal(file)))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises ValueError when it is anything else."""
    if reason := broken_seal(path):
        raise ValueError(reason)
    content = json.loads(path.read_bytes())
    del content["checksum"]
    return content


def broken_seal(path: Path) -> str | None:
    """Why a sealed file is not the one that was written; None when every byte of it is. Raises OSError."""
    head, place = _head(path)
    if place is None:
        return "its checksum is missing"
    intact = _digest(path, head, place).encode() == head[slice(*place)]
    return None if intact else "its bytes are not those that were written"


def seal_of(path: Path) -> str | None:
    """The checksum that a sealed file says it has, whether it has or not; None without one. Raises OSError."""
    head, place = _head(path)
    return None if place is None else head[slice(*place)].decode()


def _head(path: Path) -> tuple[bytes, tuple[int, int] | None]:
    """(the bytes that hold the checksum, where in them): of safetensors the header with its length, of JSON all."""
    with open(path, "rb") as file:
        head = file.read(8)
        size = int.from_bytes(head, "little") if path.suffix == ".safetensors" else -1
        head += file.read(min(size, path.stat().st_size))
    found = SEAL.search(head)
    return head, found and found.span(1)


def _digest(path: Path, head: bytes, place: tuple[int, int]) -> str:
    digest = hashlib.sha256(head[: place[0]] + BLANK.encode() + head[place[1] :])
    with open(path, "rb") as file:
        file.seek(len(head))
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    head, place = _head(path)
    assert place is not None, "written with a blank checksum"
    with open(path, "r+b") as file:
        file.seek(place[0])
        file.write(_digest(path, head, place).encode())


def seal_folder(folder: Path) -> None:
    """Write checksums.json over all files that lie in `folder` now."""
    with writing(folder):
        files = {path.relative_to(folder).as_posix(): [file_checksum(path)] for path in _sealable(folder)}
        _write_checksums(folder, files)


def _sealable(folder: Path) -> list[Path]:
    """The files that a seal covers, in order: hidden ones are unfinished, or a file system's or the hub's."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNSEALED)
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def folder_checksums(folder: Path) -> dict[str, list[str]]:
    """What a sealed folder's files may have for checksums: one each, two while one is being replaced.

    Raises InputError when checksums.json is missing or damaged.
    """
    path = folder / CHECKSUMS
    with whole(path, "checksums", "copy the folder again, or make it anew"):
        return dict(read_sealed(path)["files"])


def folder_damage(folder: Path) -> str | None:
    """Why a sealed folder is not the one that was written, naming the file; None when it is."""
    if not (folder / CHECKSUMS).exists():
        return f"{CHECKSUMS} is missing"
    try:
        files = folder_checksums(folder)
    except InputError:
        return f"{CHECKSUMS} is not the one that was written"
    for name, allowed in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_checksum(folder / name) not in allowed:
            return f"{name} is not the one that was written"
    more = sorted({path.relative_to(folder).as_posix() for path in _sealable(folder)} - files.keys())
    return f"{more[0]} was added" if more else None


def replace_sealed(path: Path, folder: Path, write: Callable[[Path], object]) -> None:
    """Replace one file of a sealed folder; killed at any moment, the folder is whole with the old or the new one.

    What an earlier one left unfinished goes.
    """
    for place in {folder, path.parent}:
        sweep(place)
    name, files = path.relative_to(folder).as_posix(), folder_checksums(folder)

    def announced(file: Path) -> None:
        write(file)
        _write_checksums(folder, files | {name: [*files[name], file_checksum(file)]})

    write_atomically(path, announced)
    _write_checksums(folder, files | {name: [file_checksum(path)]})


def _write_checksums(folder: Path, files: dict[str, list[str]]) -> None:
    write_sealed(folder / CHECKSUMS, {"files": files})


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
