"""What every reader of a published format is given: a row of the file, its fields checked as they are asked for.

It lies apart from what reads files (rows.py), which loads the readers: they need only this.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.core.errors import InputError

if TYPE_CHECKING:  # the settings know every format by name, and so must not be needed to read one
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


def is_file(source: str) -> bool:
    """Whether a source is a file's path, not the name of a data set."""
    return Path(source).suffix in (".json", ".jsonl", ".parquet")
