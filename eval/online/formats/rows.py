"""Rows of a published file, each with where it is: .json, .jsonl, .parquet, or a `datasets` name."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from eval.online.examples import Example

if TYPE_CHECKING:  # which knows a format by what is read here
    from eval.online.config import BenchmarkFile


class FileRow:
    """One row, its file and where it is. `text`, `items`, `number` give a field or raise InputError that names it."""

    def __init__(self, fields: dict[str, Any], where: str, file: "BenchmarkFile") -> None:
        self.fields, self.where, self.file = fields, where, file

    def text(self, name: str) -> str:
        """The field, text."""
        return self._of(name, str, "text")

    def items(self, name: str) -> list[Any]:
        """The field, a list."""
        return self._of(name, list, "a list")

    def number(self, name: str) -> int:
        """The field, a whole number."""
        return self._of(name, int, "a whole number")

    def texts(self, *names: str) -> list[str]:
        """The first of the fields that is there: text, or a list of at least one. Empty text is no text at all."""
        name = next((name for name in names if self.has(name)), names[0])
        if isinstance(self.fields.get(name), str):
            return [self.fields[name]] if self.fields[name] else []
        found = self.items(name)
        if not found or not all(isinstance(text, str) for text in found):
            raise InputError(f"{self.where}: field {name!r} is neither text nor a list of texts")
        return found

    def named(self, known: Callable[[str], bool], example: str) -> str:
        """The first `known` name of what the file is called: file, folder, subset, split. Raises InputError."""
        path = Path(self.file.source)
        names = (
            [path.stem, path.parent.name] if is_file(self.file.source) else [self.file.subset or "", self.file.split]
        )
        if found := next((name for name in names if known(name)), None):
            return found
        raise InputError(f"{self.where}: no field 'task', and no file or folder named after one, as in {example}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def _of(self, name: str, kind: type, words: str) -> Any:
        if not self.has(name):
            raise InputError(f"{self.where}: no field {name!r}; it has {', '.join(sorted(self.fields)) or 'none'}")
        if not isinstance(self.fields[name], kind):
            raise InputError(f"{self.where}: field {name!r} is not {words}")
        return self.fields[name]


Reader = Callable[[FileRow, str, PreTrainedTokenizerBase], list[Example]]
"""(row, the examples' name, tokenizer) -> the row's examples. Raises InputError that names row and field."""


def is_file(source: str) -> bool:
    """Whether a source is a file's path, not the name of a data set."""
    return Path(source).suffix in (".json", ".jsonl", ".parquet")


def read_rows(file: "BenchmarkFile") -> list[FileRow]:
    """The rows of `file`, its first `limit`. Raises InputError for a missing, empty or unreadable one."""
    path = Path(file.source).expanduser()
    if is_file(file.source):
        if not path.is_file():
            raise InputError(f"benchmark {path}: no such file")
        found: Iterable[Any] = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix](path)
    else:
        found = _datasets(file)
    rows = []
    for number, fields in enumerate(islice(found, file.limit), 1):
        where = f"benchmark {file.source} row {number} (as {file.format})"
        if not isinstance(fields, dict):
            raise InputError(f"{where}: not an object with fields")
        rows.append(FileRow(fields, where, file))
    if not rows:
        raise InputError(f"benchmark {file.source}: no rows")
    return rows


def _json(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise InputError(f"benchmark {path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise InputError(f"benchmark {path}: not a list of examples")
    return content


def _jsonl(path: Path) -> Iterator[Any]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8"))
                except ValueError as error:
                    raise InputError(f"benchmark {path} line {number}: not JSON in UTF-8") from error


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"benchmark {path}: not a Parquet file ({error})") from error


def _datasets(file: "BenchmarkFile") -> Iterator[Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        yield from datasets.load_dataset(file.source, file.subset, split=file.split, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"benchmark {file.source}: neither a .json, .jsonl or .parquet file nor a data set ({reason})"
        ) from error
