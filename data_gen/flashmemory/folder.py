"""A folder of dumps -> a trace store, one document after the other."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.files import file_checksum
from data_gen.core.shard import Shard
from data_gen.core.tell import Progress
from data_gen.flashmemory.document import CHUNK_TOKENS, V4_FLASH, Dropped, read_document
from data_gen.flashmemory.unpickle import load_dump
from data_gen.traces import failures
from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import DocumentMeta, Manifest, Span

NAME = re.compile(r"doc_(\d{5}|[1-9]\d{5,})\.pkl")
"""As the server numbers them; anything looser would let two files share a number."""
METADATA = "server_metadata.jsonl"
BEGINNING = 1 << 16


@dataclass
class ImportReport:
    """What became of the dumps.

    written, present: documents new in the store, and there before; dropped: from the new ones; failed: one line for
    each file that could not be read.
    """

    written: int = 0
    present: int = 0
    dropped: Dropped = field(default_factory=Dropped)
    failed: list[str] = field(default_factory=list)


def import_dumps(
    folder: Path,
    root: Path,
    trace: TraceConfig,
    progress: Progress,
    shard: Shard = Shard(),  # noqa: B008 - frozen
) -> ImportReport:
    """Read the shard's dumps of `folder` into the store at `root`; finished documents are left as they are.

    Documents keep their numbers, gaps included. A damaged file is reported and does not stop the others. Raises
    InputError when there is no dump, when `trace` does not describe dumps, and when `root` holds other traces.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = sorted(folder.glob("doc_*.pkl"))
    paths = [path for path in found if NAME.fullmatch(path.name)]
    if not paths:
        raise InputError(f"{folder}: no dump there (doc_00000.pkl ...)")
    if trace.oracle != "indexer" or trace.chunking.tokens != CHUNK_TOKENS:
        raise InputError(f"trace: dumps need oracle `indexer` and chunks of {CHUNK_TOKENS} tokens")
    if unknown := sorted(set(trace.layers) - set(V4_FLASH.full_layers)):
        raise InputError(f"trace.layers: {unknown} are not among the {len(V4_FLASH.full_layers)} CSA layers of a dump")
    numbers = {_number(path): path for path in paths}
    plan = {number: (path.stem, _beginning(path)) for number, path in numbers.items()}
    manifest = Manifest(backbone=V4_FLASH, trace=trace, documents={}, plan=plan, versions={"torch": version("torch")})
    store = TraceStore.create(root, manifest)
    if shard.count == 1:
        store.sweep()
    else:
        failures.begin(root, shard)
    others = [f"{path}: not named like a dump (doc_00000.pkl)" for path in found if path not in paths]
    report = ImportReport(failed=others)
    metadata = _read_metadata(folder / METADATA, report)
    for path in progress([path for number, path in numbers.items() if shard.owns(number)], "importing"):
        number = _number(path)
        try:
            if store.path(number).exists():
                _check_same(path, TraceDocument(store.path(number), trace, store.manifest.planned(number)))
                report.present += 1
                continue
            dropped = _import_one(path, number, store, metadata.get(path.name, {}))
        except (InputError, RuntimeError, MemoryError) as error:  # of one file; what the disk says stops the import
            reason = str(error).splitlines()[0] if str(error) else "too large for this machine's memory"
            report.failed.append(f"{path}: {reason}")
            continue
        report.written += 1
        report.dropped += dropped
    if not TraceStore(root, store.manifest).missing():
        failures.finish(root)
        store.sweep()
    return report


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("doc_"))


def _beginning(path: Path) -> str:
    """What tells a dump from another of its name before it is read whole: a hash of its size and beginning."""
    try:
        with open(path, "rb") as file:
            read = f"{path.stat().st_size} ".encode() + file.read(BEGINNING)
    except OSError:  # a damaged file is reported when its turn comes
        read = b""
    return hashlib.sha256(read).hexdigest()[:16]


def _check_same(path: Path, document: TraceDocument) -> None:
    """Raise InputError when `document` was made of another dump than `path`: every folder counts from 0."""
    if document.source.get("sha256") != _checksum(path):
        raise InputError(f"{document.path} was made from another dump; import each folder into a store of its own")


def _checksum(path: Path) -> str:
    try:
        return file_checksum(path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})") from error


def _import_one(path: Path, number: int, store: TraceStore, server: dict[str, Any]) -> Dropped:
    """Write one document; its InputErrors do not repeat the path."""
    layers = store.manifest.trace.layers
    raw, dropped = read_document(load_dump(path), layers)
    meta = DocumentMeta(
        name=path.stem,
        task="chat",
        length=max(int(raw.positions[-1]) + 1, len(raw.keys[layers[0]]) * CHUNK_TOKENS),
        spans=[Span(first=0, last=len(raw.positions), serve=0, tail=True)],
    )
    client = _read_json(path.with_suffix(".json"))
    source = {"client": client, "server": server, "dropped": vars(dropped), "sha256": _checksum(path)}
    store.write(number, meta, raw, source)
    return dropped


def _read_json(path: Path) -> dict[str, Any]:
    """prompt, response, original_index, rid; empty where the dump has no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path.name} is not JSON ({error}); repair or delete it") from error
    if not isinstance(found, dict):
        raise InputError(f"{path.name} holds no JSON object; repair or delete it")
    return found


def _read_metadata(path: Path, report: ImportReport) -> dict[str, dict[str, Any]]:
    """The server's line on each dump, by the dump's file name."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        report.failed.append(f"{path}: cannot be read ({error.strerror or error})")
        return found
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[entry["filename"]] = entry
        except (ValueError, KeyError, TypeError, RecursionError):
            report.failed.append(f"{path}: line {number} describes no dump")
    return found
