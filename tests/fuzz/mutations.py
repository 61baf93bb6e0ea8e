"""Ways to change bytes, values of JSON, headers of safetensors files and the files of a folder, drawn from a seed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

EXTREMES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**70, 10**30, 1e308, 0.5, float("nan"), float("inf"), "", "x", "\ud83d",
    "../x", [], {}, [[]], [None], {"x": 1},
]  # fmt: skip


def _insert(data: bytes, rng: Random, new: bytes, over: int) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + new + data[place + over :]


def _slice(data: bytes, rng: Random) -> tuple[int, int]:
    first, last = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return first, last


def _flip(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(max(1, len(data)))
    return data[:place] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[place : place + 1]) + data[place + 1 :]


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice([0, 1, 8, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)])]


def _cut_out(data: bytes, rng: Random) -> bytes:
    first, last = _slice(data, rng)
    return data[:first] + data[last:]


def _repeat(data: bytes, rng: Random) -> bytes:
    first, last = _slice(data, rng)
    return data[:last] + data[first:]


def _zero(data: bytes, rng: Random) -> bytes:
    first, last = _slice(data, rng)
    return data[:first] + bytes(last - first) + data[last:]


def _swap_blocks(data: bytes, rng: Random) -> bytes:
    half = max(1, len(data) // 4)
    one, two = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    size = rng.randrange(half)
    one_end = min(one + size, two)
    return data[:one] + data[two : two + size] + data[one_end:two] + data[one:one_end] + data[two + size :]


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "one bit flipped": _flip,
    "one digit changed": lambda data, rng: _insert(data, rng, b"%d" % rng.randrange(10), 1),
    "random bytes over others": lambda data, rng: _insert(data, rng, rng.randbytes(9), 9),
    "bytes put in": lambda data, rng: _insert(data, rng, rng.choice([b"\0", b"\n", b"}", b'"', b"\xff", b" "]), 0),
    "brackets without end": lambda data, rng: _insert(data, rng, b"[" * 100_000, 0),
    "digits without end": lambda data, rng: _insert(data, rng, b"9" * 5_000, 0),
    "cut short": _truncate,
    "a part cut out": _cut_out,
    "a part twice": _repeat,
    "a part zeroed": _zero,
    "two parts swapped": _swap_blocks,
    "more at the end": lambda data, rng: data + rng.choice([b"\0", b"\n", b"{}", data[:100]]),
    "a mark of byte order": lambda data, rng: b"\xef\xbb\xbf" + data,
    "other bytes": lambda data, rng: rng.randbytes(rng.choice([1, 8, 300])),
}
"""What can become of a file's bytes."""


def edit_bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    """(changed, in words)."""
    what = rng.choice(list(BYTES))
    return BYTES[what](data, rng), what


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every node of a JSON value, by its path."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in below for place in _places(part, (*path, key)))]


def _near(value: Any, rng: Random) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 1.5, value / 3])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.swapcase(), value[::-1], value * 2])
    if isinstance(value, list) and value:
        return rng.choice([value[:-1], value[1:], [*value, value[0]], value[::-1], [*value[1:], value[0]]])
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        rest = {name: part for name, part in value.items() if name != key}
        return rng.choice([rest, rest | {f"{key}x": value[key]}, value | {"more": 1}])
    return "x"


def edit_value(value: Any, rng: Random) -> tuple[Any, tuple[Any, ...], str]:
    """(a copy of a JSON value in which one node is another, where, in words)."""
    place = rng.choice(_places(value))
    node = value
    for key in place:
        node = node[key]
    new = rng.choice(EXTREMES) if rng.random() < 0.5 else _near(node, rng)
    told = repr(new)
    what = f"{'.'.join(map(str, place)) or 'all'} becomes {told[:40]}"
    return _replaced(value, place, new), place, what


def _replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = _replaced(value[place[0]], place[1:], new)
    return copy


def edit_json(data: bytes, rng: Random) -> tuple[bytes, str]:
    """(the JSON text with one node changed, in words)."""
    value, _, what = edit_value(json.loads(data), rng)
    return json.dumps(value, indent=2).encode(), what


def edit_header(data: bytes, rng: Random) -> tuple[bytes, str]:
    """(a safetensors file whose header says something else, in words)."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header and rng.random() < 0.5:
        name = rng.choice(list(header["__metadata__"]))
        try:
            value, _, what = edit_value(json.loads(header["__metadata__"][name]), rng)
            header["__metadata__"][name] = json.dumps(value)
        except json.JSONDecodeError:  # plain text
            header["__metadata__"][name] = str(_near(header["__metadata__"][name], rng))
            what = "another text"
        what = f"metadata {name}: {what}"
    else:
        header, _, what = edit_value(header, rng)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :], f"header: {what}"


def edit_file(path: Path, rng: Random) -> str:
    """Change a file's content, by its format or as bytes; in words."""
    data = path.read_bytes()
    edit = edit_bytes
    if path.suffix == ".json" and rng.random() < 0.6:
        edit = edit_json
    if path.suffix == ".safetensors" and rng.random() < 0.4:
        edit = edit_header
    changed, what = edit(data, rng)
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def edit_folder(files: list[Path], rng: Random, copies: Callable[[Path], Path] | None = None) -> str:
    """Change one of the files, swap two, or take one away; in words.

    copies: the name that a copy of a file is given, where one more file says something.
    """
    path = rng.choice(files)
    what = rng.choice(["content"] * 8 + ["deleted", "swapped", "replaced", "a folder"] + ["copied"] * bool(copies))
    if what == "content":
        return edit_file(path, rng)
    if what == "copied" and copies:
        shutil.copyfile(path, copies(path))
    else:
        other = rng.choice([each for each in files if each != path and each.suffix == path.suffix] or files)
        content, others = path.read_bytes(), other.read_bytes()
        path.unlink()
        if what == "swapped" and other != path:
            other.write_bytes(content)
        if what in ("swapped", "replaced"):
            path.write_bytes(others)
        if what == "a folder":
            path.mkdir()
    return f"{path.name}: {what}"
