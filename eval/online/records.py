"""What became of an example, typed, and the file that keeps it: a killed run continues where it was."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_gen.core.errors import InputError


class RunRecord(BaseModel):
    """One example under one policy and budget.

    budget: None for what has none; kept: resident tokens / all tokens; kv_bytes, chunks: resident, these three over
    the tokens of the policy's own answer; refreshes: times the resident set was fixed; fallbacks of windows: read with
    full attention, None where that is not counted; fetched: chunks from the cold side, a token; mean_key_bytes: held
    for a per-step correction, both None where none is asked for; agreement, kl, loss: means over the tokens of a text
    that is followed (nats); score, response: of an answer, with what it was begun with.
    """

    model_config = ConfigDict(frozen=True)

    policy: str
    budget: float | None
    kept: float
    kv_bytes: float
    chunks: float
    refreshes: int
    fallbacks: int | None = None
    windows: int | None = None
    fetched: float | None = None
    mean_key_bytes: int | None = None
    agreement: float | None = None
    kl: float | None = None
    loss: float | None = None
    score: float | None = None
    response: str | None = None


class Record(BaseModel):
    """What became of one example.

    length: tokens asked for, None for what is as long as it is; depth: mean depth of what is asked for, 0 to 1;
    tokens: prompt and answer at its longest; left_out: why it has no runs, empty where it has; runs: one a policy and
    budget, full attention first; origin: machine and versions, where they were noted.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    benchmark: str
    task: str
    length: int | None
    depth: float | None
    tokens: int
    left_out: str
    runs: list[RunRecord]
    origin: dict[str, Any] | None = None

    def written(self) -> dict[str, Any]:
        """As the journal holds it: what was not measured is missing."""
        return self.model_dump(exclude_unset=True)


class Journal:
    """An append-only file of records by their name, one JSON line each behind a line of settings.

    settings: what every record depends on, JSON. Raises InputError when the file was written under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may leave half a line
        header, records = _parsed(path, whole.splitlines())
        for name in settings | header:
            if whole and settings.get(name) != header.get(name):
                raise InputError(
                    f"{path}: holds answers under other settings ({name}); choose another folder or remove the file"
                )
        self.records = {record.name: record for record in records}
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.truncate(len(whole))
        if not whole:
            self._write(settings)

    def add(self, record: Record) -> None:
        """Keep a record, on disk before this returns."""
        self._write(record.written())
        self.records[record.name] = record

    def _write(self, content: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """(settings, records) of a file that another process may be writing. Raises InputError when it is damaged."""
    whole = path.read_bytes()
    return _parsed(path, whole[: whole.rfind(b"\n") + 1].splitlines())


def _parsed(path: Path, lines: list[bytes]) -> tuple[dict[str, Any], list[Record]]:
    """Settings ({} of no lines) and records of whole lines."""
    try:
        header, *records = [json.loads(line) for line in lines] or [{}]
        return header, [Record.model_validate(record) for record in records]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged (not JSON lines); remove it to start anew") from error
    except ValidationError as error:
        raise InputError(f"{path}: damaged (no record of an example); remove it to start anew") from error
