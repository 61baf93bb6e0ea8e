"""Finished examples on disk, one JSON line each behind a line of settings: a killed run continues where it was."""

import json
import os
from pathlib import Path
from typing import Any

from data_gen.core.errors import InputError

Record = dict[str, Any]


class Journal:
    """An append-only file of records by their name.

    settings: what every record depends on, JSON. Raises InputError when the file was written under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may leave half a line
        try:
            header, *records = [json.loads(line) for line in whole.splitlines()] or [settings]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: damaged (not JSON lines); remove it to start anew") from error
        for name in settings | header:
            if settings.get(name) != header.get(name):
                raise InputError(
                    f"{path}: holds answers under other settings ({name}); choose another folder or remove the file"
                )
        self.records = {record["name"]: record for record in records}
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.truncate(len(whole))
        if not whole:
            self._write(settings)

    def add(self, record: Record) -> None:
        """Keep a record, on disk before this returns."""
        self._write(record)
        self.records[record["name"]] = record

    def _write(self, content: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())
