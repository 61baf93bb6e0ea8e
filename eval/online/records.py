"""What became of an example, typed, and the file that keeps it: a killed run continues where it was."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from data_gen.core.errors import InputError
from data_gen.core.files import whole, writing


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
    budget, full attention first.
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

    def written(self) -> dict[str, Any]:
        """As the journal holds it: what was not measured is missing."""
        return self.model_dump(exclude_unset=True)


class Journal:
    """An append-only file of records by their name, one JSON line each after a line of settings.

    settings: what every record depends on, JSON. Raises InputError when the file was written under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes() if path.exists() else b""
        lines = lines[: lines.rfind(b"\n") + 1]  # a killed run may leave half a line
        header, records = _parsed(path, lines)
        for name in settings | header:
            if lines and settings.get(name) != header.get(name):
                raise InputError(
                    f"{path}: holds answers under other settings ({name}); choose another folder or remove the file"
                )
        self.records = {record.name: record for record in records}
        with open(path, "r+b" if path.exists() else "xb") as file:
            file.truncate(len(lines))
        if not lines:
            self._write(settings)

    def add(self, record: Record) -> None:
        """Keep a record, on disk before this returns."""
        self._write(record.written())
        self.records[record.name] = record

    def _write(self, content: dict[str, Any]) -> None:
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _parsed(path: Path, lines: bytes) -> tuple[dict[str, Any], list[Record]]:
    """Settings ({} of no lines) and records of whole lines."""
    with whole(path, "journal", "remove it to start anew"):
        header, *records = [json.loads(line) for line in lines.splitlines()] or [{}]
        if not isinstance(header, dict):
            raise ValueError("its first line holds no settings")
        return header, [Record.model_validate(record) for record in records]
