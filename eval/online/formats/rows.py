"""A published file, .json, .jsonl, .parquet or a `datasets` name: its rows, and their examples."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from eval.online.config import BenchmarkFile
from eval.online.examples import Example
from eval.online.formats import FORMATS
from eval.online.formats.file_row import FileRow, is_file

Reader = Callable[[FileRow, str, PreTrainedTokenizerBase], list[Example]]
"""(row, the examples' name, tokenizer) -> the row's examples. Raises InputError that names row and field."""


def read_benchmark(file: BenchmarkFile, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Every example of a file. Raises InputError for a file of another format, naming row and field."""
    name = "-".join(filter(None, [file.format, file.source, file.subset, file.split]))
    read: Reader = resolve_name(FORMATS[file.format])
    examples = [
        example
        for index, row in enumerate(read_rows(file))
        for example in read(row, f"{name}-{_digest(row)}-{index:05d}", tokenizer)
    ]
    if file.format == "mrcr":
        return examples  # each in the bin of its own length
    longest = max((example.length or 0 for example in examples), default=0)
    return [replace(example, length=longest or None) for example in examples]


def _digest(row: FileRow) -> str:
    """So that answers to a file that changed are not taken for answers to this one."""
    return hashlib.sha256(json.dumps(row.fields, sort_keys=True, default=str).encode()).hexdigest()[:8]


def read_rows(file: BenchmarkFile) -> list[FileRow]:
    """The rows of `file`, its first `limit`. Raises InputError for a missing, empty or unreadable one."""
    path = Path(file.source).expanduser()
    if is_file(file.source):
        if not path.is_file():
            raise InputError(f"benchmark {path}: no such file")
        found: Iterable[Any] = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}[path.suffix](path)
    else:
        found = _datasets(file)
    rows: list[FileRow] = []
    try:
        for number, fields in enumerate(islice(found, file.limit), 1):
            where = f"benchmark {file.source} row {number} (as {file.format})"
            if not isinstance(fields, dict):
                raise InputError(f"{where}: not an object with fields")
            rows.append(FileRow(fields, where, file))
    except InputError:
        raise
    except Exception as error:  # of the readers of every format
        wanted = "" if is_file(file.source) else "neither a .json, .jsonl or .parquet file nor a data set: "
        reason = f"{wanted}cannot be read after row {len(rows)} ({one_line(error)})"
        raise InputError(f"benchmark {file.source}: {reason}") from error
    if not rows:
        raise InputError(f"benchmark {file.source}: no rows")
    return rows


def _json(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, list):
        raise InputError(f"benchmark {path}: not a list of examples")
    yield from content


def _jsonl(path: Path) -> Iterator[Any]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"benchmark {path} line {number}: not JSON in UTF-8") from error


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(batch_size=16):
        yield from batch.to_pylist()


def _datasets(file: BenchmarkFile) -> Iterator[Any]:
    import datasets

    yield from datasets.load_dataset(file.source, file.subset, split=file.split, streaming=True)
