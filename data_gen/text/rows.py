"""Rows of JSON files and data sets, as text or chats. A bad row is a value (an InputError): reading may continue."""

import gzip
import importlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_gen.core.errors import InputError
from data_gen.core.files import one_line

RawDocument = str | list[dict[str, Any]]
"""Plain text, or the messages of a chat ({role, content} each, both text; more keys are the chat template's)."""
LARGEST_ROW = 1 << 24
"""Bytes of a line of JSON, the text of several of the longest contexts: longer ones are refused unread."""
BLOCK = 1 << 16
"""Bytes of a compressed file that are read at once."""
REASONS = 3
"""Bad rows whose reason is kept."""


@dataclass
class Skipped:
    """Bad rows that were left out: how many, and what was wrong with the first ones.

    unfit: numbers of those documents of the source that were read, but of which no whole document could be made.
    """

    count: int = 0
    reasons: list[str] = field(default_factory=list)
    unfit: set[int] = field(default_factory=set)

    def add(self, error: InputError) -> None:
        """Count one."""
        self.count += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(str(error))

    def __str__(self) -> str:
        return f"{self.count} bad rows skipped: {'; '.join(self.reasons)}{' ...' if self.count > REASONS else ''}"


def read_lines(name: str, start: Callable[[], BinaryIO], text_field: str) -> Iterator[RawDocument | InputError]:
    """One row a line of a .jsonl, .jsonl.gz or .jsonl.zst file; start: opens its bytes from the beginning.

    Raises InputError where the file itself is damaged.
    """
    number = 0
    try:
        with _opened(name, start) as lines:
            while line := lines.readline(LARGEST_ROW + 1):
                number += 1
                where = f"{name} line {number}"
                if len(line) > LARGEST_ROW:
                    yield InputError(f"documents {where}: a row of more than {LARGEST_ROW >> 20} MiB; split it")
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(LARGEST_ROW)
                elif line.strip():
                    row = _parsed(line, where)
                    yield row if isinstance(row, InputError) else checked(row, text_field, where)
    except InputError:
        raise
    except Exception as error:  # of three formats' readers
        raise InputError(f"documents {name}: cannot be read after line {number} ({one_line(error)})") from error


def _opened(name: str, start: Callable[[], BinaryIO]) -> BinaryIO:
    """A file's lines; a compressed one is read to its end first: damage there is no text that was left out."""
    if name.endswith(".gz"):
        with start() as packed, gzip.open(packed) as file:
            while file.read(BLOCK):
                pass
        return cast(BinaryIO, gzip.open(start()))
    if not name.endswith(".zst"):
        return start()
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError as error:
        raise InputError(f"documents {name}: reading it needs the package zstandard: pip install zstandard") from error
    with start() as file:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while block := file.read(BLOCK):
            while block:
                frame = zstandard.ZstdDecompressor().decompressobj() if frame.eof else frame
                frame.decompress(block)
                block = frame.unused_data
        if not frame.eof:
            raise EOFError("it was cut short")
    reader = zstandard.ZstdDecompressor().stream_reader(start(), read_across_frames=True)
    return io.BufferedReader(reader)  # its own has no readline


def _parsed(data: bytes, where: str) -> Any:
    """The row, or an InputError: whatever the parser makes of hostile text ends here."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return InputError(f"documents {where}: not JSON in UTF-8")
    except (ValueError, RecursionError, MemoryError) as error:  # integers of 5,000 digits, nesting without end
        return InputError(f"documents {where}: not JSON that can be read ({one_line(error)})")


def read_list(path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    """The rows of a .json file, which holds a list of them. Raises InputError when it does not."""
    rows = _parsed(path.read_bytes(), str(path))
    if isinstance(rows, InputError):
        raise rows
    if not isinstance(rows, list):
        raise InputError(f"documents {path}: holds no list of rows")
    for number, row in enumerate(rows, 1):
        yield checked(row, text_field, f"{path} row {number}")


def read_dataset(
    name: str, text_field: str, where: str, subset: str | None, split: str, data_files: str | None = None
) -> Iterator[RawDocument | InputError]:
    """Rows of a `datasets` name, or of `data_files` in the format `name`. where: what the user called it.

    Yields an InputError for a row without text; raises one where nothing more can be read.
    """
    from datasets import load_dataset
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    if data_files is None and name in _PACKAGED_DATASETS_MODULES:
        raise InputError(f"documents {where}: the name of a format, not of a data set; name a file or a folder")
    number = 0
    try:
        rows = load_dataset(name, subset, split=split, streaming=True, data_files=data_files)
        for number, row in enumerate(rows, 1):
            yield checked(row, text_field, f"{where} row {number}")
    except Exception as error:  # of the many readers that a name may stand for
        if data_files or number or Path(name).is_dir():
            raise InputError(f"documents {where}: cannot be read after row {number} ({one_line(error)})") from error
        reason = f"no such file or folder, and no data set either ({one_line(error)})"
        raise InputError(f"documents {where}: {reason}") from error


def checked(row: object, text_field: str, where: str) -> RawDocument | InputError:
    """The text or chat in a row, or what is wrong with it. where: file and line."""
    found = None
    if isinstance(row, dict) and (found := row.get(text_field)) is None:
        found = row.get("messages")
    content: RawDocument | None = found if isinstance(found, str) else None
    if isinstance(found, list):
        messages = [message for message in map(_message, found) if message is not None]
        content = messages if len(messages) == len(found) else None
    if content is None:
        return InputError(
            f"documents {where}: needs a text field {text_field!r} or chat `messages` of role and content"
        )
    if not content or (isinstance(content, str) and not content.strip()):
        return InputError(f"documents {where}: an empty document")
    try:
        (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:
        return InputError(f"documents {where}: holds half of a surrogate pair, which is no text")
    except RecursionError:
        return InputError(f"documents {where}: is nested too deeply")
    return content


def _message(message: object) -> dict[str, Any] | None:
    """A message with its content as one text; None where there is none. Tool calls may stand in its place."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return None
    content = message.get("content")
    if isinstance(content, str):
        return message
    if content is None and message.get("tool_calls"):
        return message | {"content": ""}
    if isinstance(content, list) and content:
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) == len(content) and all(part.get("type", "text") == "text" for part in content):
            return message | {"content": "".join(parts)}
    return None
