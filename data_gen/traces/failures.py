"""What is known of a run by several workers beside its stores: who works, and which documents could not be traced.

OUT/shards/3-of-8       made when worker 3 of 8 begins
OUT/shards/NAME.begun   an empty line for each worker that died while it traced document NAME, where Ray replaces them
OUT/failed.jsonl        a line for each attempt that failed: document, reason, shard, side

Both are gone once every document is there: what is left does not depend on how many workers there were.
"""

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data_gen.core.errors import InputError
from data_gen.core.shard import Shard

FAILED, SHARDS = "failed.jsonl", "shards"
MOST = "10%"
"""Of a worker's documents may fail, where nothing else is said."""


class Failures:
    """The failures of one worker, of whose `documents` at most `most` (a number, or a share as 5%) may fail."""

    def __init__(self, out: Path, shard: Shard, most: str, documents: int) -> None:
        self.path, self.shard, self.count, self.asked = out / FAILED, shard, 0, most
        self.most = parse_most(most, documents)

    def add(self, document: str, side: str, reason: str) -> bool:
        """Write one down; whether the worker may continue."""
        self.count += 1
        line = json.dumps({"document": document, "reason": reason, "shard": str(self.shard), "side": side})
        _append(self.path, line)
        return self.count <= self.most

    def __str__(self) -> str:
        if self.count > self.most:
            return f"{self.count} documents failed, more than --max-failures {self.asked} allows: {self.path}"
        return f"{self.count} documents failed, see {self.path}; the same command tries them again"


def parse_most(text: str, documents: int) -> int:
    """How many of `documents` may fail. Raises InputError for anything but a number or a share."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text)
    if found is None or not (found[2] or found[1].isdigit()):
        raise InputError(f"--max-failures {text}: give a number, or a share such as 5%")
    return math.ceil(float(found[1]) / 100 * documents) if found[2] else int(found[1])


def failed(out: Path) -> list[str]:
    """Names of the documents in `out`/failed.jsonl, each once; a line that was cut short says nothing."""
    found: dict[str, None] = {}
    if (out / FAILED).exists():
        for line in (out / FAILED).read_text(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                found[json.loads(line)["document"]] = None
    return list(found)


def begin(out: Path, shard: Shard) -> None:
    """Leave a note that this worker has begun."""
    folder = out / SHARDS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{shard.index}-of-{shard.count}").touch()


@contextmanager
def begun(out: Path, document: str) -> Iterator[int]:
    """While a worker traces a document: how many died while they did."""
    note = out / SHARDS / f"{document}.begun"
    note.parent.mkdir(parents=True, exist_ok=True)
    deaths = _append(note, "")  # a byte for each
    try:
        yield deaths
    finally:
        note.unlink(missing_ok=True)


def _append(path: Path, line: str) -> int:
    """Add a line to a file, below what was cut short there; returns how many bytes the file had.

    Raises OSError, with `path`, when there is no room.
    """
    from data_gen.core.files import writing  # it imports torch, for which `lookahead --help` does not wait

    with writing(path), open(path, "ab+") as file:
        with suppress(OSError):  # a file system without locks: this is one write
            fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size  # now that nobody else writes
        file.seek(max(0, size - 1))
        end = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write(f"{end}{line}\n".encode())
        return size


def finish(out: Path) -> None:
    """Every document is there: nobody works any more, and no failure lasts."""
    shutil.rmtree(out / SHARDS, ignore_errors=True)
    (out / FAILED).unlink(missing_ok=True)


def shards_of(store: Path, missing: Sequence[int]) -> str:
    """Whose the missing documents are, in words, by the last number of workers that was seen; "" of one worker."""
    notes = [note for folder in (store, store.parent) for note in folder.glob(f"{SHARDS}/*-of-*")]
    if not notes:
        return ""
    count = int(max(notes, key=lambda note: note.stat().st_mtime_ns).name.partition("-of-")[2])
    whose = sorted({number % count for number in missing})
    return f": shards {', '.join(f'{index}/{count}' for index in whose)}" if count > 1 else ""
