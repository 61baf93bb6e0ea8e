"""Raw text from folders, files of rows, data sets, the interpreter or a package, and its two sides told apart."""

import ast
import glob
import hashlib
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import fsspec

from data_gen.config import DocumentsConfig
from data_gen.core.errors import InputError
from data_gen.core.files import one_line, package_folder
from data_gen.text.rows import RawDocument, Skipped, read_dataset, read_lines, read_list
from data_gen.text.seen import Seen

WHOLE = ("document", "chat")
"""Tasks that read a source's documents as they are; the others pack its paragraphs to a length."""
TEXT_FILES = {".txt", ".md", ".markdown", ".rst"}
"""What is read of a folder."""
LEAST = 80
"""Characters of a paragraph that counts: headings and thanks are everybody's."""


def read_source(source: str | list[str], text_field: str, skipped: Skipped | None = None) -> Iterator[RawDocument]:
    """Raw documents of `source`, one after the other if it is several, each in a fixed order.

    skipped: counts rows that hold no document, which are left out; None: the first ends it. Raises InputError for a
    missing, empty or damaged source.
    """
    for one in [source] if isinstance(source, str) else source:
        found = False
        for document in _read(one, text_field):
            if isinstance(document, InputError):
                if skipped is None:
                    raise document
                skipped.add(document)
                continue
            found = True
            if not document or (isinstance(document, str) and not document.strip()):
                raise InputError(f"documents {one}: an empty document")
            yield document
        if not found:
            raise InputError(f"documents {one}: no document there")


def _read(source: str, text_field: str) -> Iterator[RawDocument | InputError]:
    if not source:
        raise InputError("documents: an empty name; name a source")
    path = Path(source).expanduser()
    return next(kind for kind in SOURCES.values() if kind.takes(source, path)).read(source, path, text_field)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"documents {path}: no such file or folder")
    return path


def _builtin() -> Iterator[str]:
    """CPython's language reference, as shipped for `help()`, then the docstrings of each standard module."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        if docstrings := _docstrings(file):
            yield docstrings


@cache
def _docstrings(file: Path) -> str:
    """All of a module, parsed once: the whole library takes seconds, and each side of a split reads it."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(file.read_bytes()))
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented))))


def _code(root: Path) -> Iterator[str]:
    """The Python files of a library, its tests left out; the interpreter's own has about 3 million tokens."""
    for file in sorted(root.rglob("*.py")):
        if not {"test", "tests", "site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            try:
                with tokenize.open(file) as code:
                    text = code.read()
            except (SyntaxError, UnicodeDecodeError) as error:
                raise InputError(f"documents {file}: not Python source in the encoding that it declares") from error
            if text.strip():  # many packages begin with an empty __init__.py
                yield text


def _folder(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in TEXT_FILES and file.is_file():
            try:
                text = file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"documents {file}: not UTF-8 text") from error
            if not text.strip():
                raise InputError(f"documents {file}: an empty document")
            yield text


@dataclass(frozen=True)
class SourceKind:
    """One kind of place that text comes from.

    takes: (source, the same as a path) -> whether it is one; read: (source, path, text_field) -> its raw documents, in
    a fixed order, and an InputError in the place of each bad row.
    """

    takes: Callable[[str, Path], bool]
    read: Callable[[str, Path, str], Iterator[RawDocument | InputError]]


def _read_package(source: str, path: Path, text_field: str) -> Iterator[str]:
    return _code(package_folder(source.removeprefix("package:"), f"documents {source}"))


def _read_glob(source: str, path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    files = sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise InputError(f"documents {source}: no file has such a name")
    for file in files:
        yield from _read(file, text_field)


def _read_jsonl(source: str, path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    return read_lines(str(_existing(path)), lambda: path.open("rb"), text_field)


def _read_parquet(source: str, path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    return read_dataset("parquet", text_field, str(_existing(path)), None, "train", data_files=str(path))


def _read_address(source: str, path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    if not path.name.endswith((*_LINES, ".json", ".parquet")):
        known = ".jsonl, .jsonl.gz, .jsonl.zst, .json or .parquet"
        raise InputError(f"documents {source}: expected an address that ends in {known}")
    if path.name.endswith(_LINES):
        return _read_lines_at(source, text_field)
    return read_dataset(path.suffix[1:], text_field, source, None, "train", data_files=source)


def _read_lines_at(address: str, text_field: str) -> Iterator[RawDocument | InputError]:
    """As files on this machine are read: one bad row is a value."""
    try:
        files = fsspec.open_files(address)
    except Exception as error:  # of whichever package reads such addresses
        raise InputError(f"documents {address}: cannot be read ({one_line(error)})") from error
    for file in files:
        yield from read_lines(file.full_name, lambda file=file: io.BufferedReader(file.open()), text_field)


def _refuse(source: str, path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    known = "a folder of texts, .jsonl, .jsonl.gz, .jsonl.zst, .json or .parquet"
    raise InputError(f"documents {_existing(path)}: expected {known}")


def _read_named(source: str, path: Path, text_field: str) -> Iterator[RawDocument | InputError]:
    name, *rest = source.split(":")
    subset, split = [*rest, "", ""][:2]
    if len(rest) > 2:
        raise InputError(f"documents {source}: has more parts than NAME:SUBSET:SPLIT")
    return read_dataset(str(Path(name).expanduser()), text_field, source, subset or None, split or "train")


_GLOB = re.compile(r"[*?\[]")
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SOURCES: dict[str, SourceKind] = {
    "builtin": SourceKind(lambda source, path: source == "builtin", lambda *_: _builtin()),
    "stdlib": SourceKind(lambda source, path: source == "stdlib", lambda *_: _code(Path(sysconfig.get_path("stdlib")))),
    "package": SourceKind(lambda source, path: source.startswith("package:"), _read_package),
    "address": SourceKind(lambda source, path: "://" in source, _read_address),
    "folder": SourceKind(lambda source, path: path.is_dir(), lambda source, path, field: _folder(path)),
    "glob": SourceKind(lambda source, path: bool(_GLOB.search(source)) and not path.exists(), _read_glob),
    "jsonl": SourceKind(lambda source, path: path.name.endswith(_LINES), _read_jsonl),
    "json": SourceKind(
        lambda source, path: path.suffix == ".json", lambda source, path, field: read_list(_existing(path), field)
    ),
    "parquet": SourceKind(lambda source, path: path.suffix == ".parquet", _read_parquet),
    "other": SourceKind(
        lambda source, path: path.exists() or path.suffix.lower() in TEXT_FILES
        or (source.startswith((".", "/", "~")) and ":" not in source),
        _refuse,
    ),
    "datasets": SourceKind(lambda source, path: True, _read_named),
}  # fmt: skip
"""Every kind of source; the first that takes a source reads it."""


def split_paragraphs(documents: Iterable[str], heldout_share: float) -> Iterator[tuple[bool, list[str]]]:
    """(held out?, paragraphs) of each document, every paragraph given once in the whole source.

    A document's side is decided by a hash of its text, so it does not depend on what else is read; paragraphs that
    repeat (white space aside) stay with the first document that has them, so the sides never share text.
    """
    seen = Seen()
    for text in documents:
        found = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        if paragraphs := [paragraph.strip("\n") for paragraph in found if seen.add(" ".join(paragraph.split()))]:
            yield _is_held_out(raw_digest(text), heldout_share), paragraphs


def documents_of(config: DocumentsConfig, skipped: Skipped | None = None) -> Iterator[RawDocument]:
    """The raw documents of a recipe's source; `skipped` counts bad rows where the recipe skips them."""
    skip = config.bad_rows == "skip"
    return read_source(config.source, config.text_field, (skipped or Skipped()) if skip else None)


class Numbered:
    """The raw documents of a source, and which of them was read last: its number and digest."""

    def __init__(self, documents: Iterable[RawDocument]) -> None:
        self.documents = documents
        self.last: tuple[int, bytes] = (-1, b"")

    def __iter__(self) -> Iterator[RawDocument]:
        for number, document in enumerate(self.documents):
            self.last = number, raw_digest(document)
            yield document


def raw_digest(document: RawDocument) -> bytes:
    """SHA-256 of a text or a chat as the source holds it."""
    text = document if isinstance(document, str) else json.dumps(document)
    return hashlib.sha256(text.encode()).digest()


def whole_documents(documents: Iterable[RawDocument], config: DocumentsConfig, held_out: bool) -> Iterator[RawDocument]:
    """One side of a source's `documents` for the tasks of WHOLE, each once, white space aside.

    As of packed text, a hash decides a document's side: what else the source holds, and where, moves none.
    """
    share, seen = _whole_share(config), Seen()
    for document in documents:
        key = " ".join(json.dumps(document).replace("\\n", " ").split())
        if seen.add(key) and _is_held_out(hashlib.sha256(key.encode()).digest(), share) == held_out:
            yield document


def _whole_share(config: DocumentsConfig) -> float:
    """The share of whole documents and chats that is held out."""
    if config.heldout_share is not None:
        return config.heldout_share
    training, heldout = _whole_counts(config)
    return heldout / max(1, training + heldout)


def _whole_counts(config: DocumentsConfig) -> tuple[int, int]:
    training, heldout = (sum(tasks.get(task, 0) for task in WHOLE) for tasks in (config.train, config.heldout))
    return training, heldout


def _is_held_out(digest: bytes, share: float) -> bool:
    return int.from_bytes(digest[:4], "big") / 2**32 < share


@dataclass
class Overlap:
    """documents: held-out ones; sharing: those with a paragraph of a training document; share: of all their text."""

    documents: int
    sharing: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.sharing} of {self.documents} held-out documents share paragraphs with training ones "
            f"({self.share:.1%} of the held-out text)"
        )


def measure_overlap(config: DocumentsConfig, unfit: Set[int] = frozenset()) -> Overlap:
    """Of the documents and chats that are read whole; of packed text it is none. unfit: see `Skipped`."""
    training, heldout = _whole_counts(config)
    if not training or not heldout:
        return Overlap(heldout, 0, 0.0)
    seen = Seen()
    for document in islice(_fit_documents(config, False, unfit), training):
        for paragraph in _paragraphs(document):
            seen.add(paragraph)
    sharing = common = total = 0
    for document in islice(_fit_documents(config, True, unfit), heldout):
        paragraphs = list(_paragraphs(document))
        shared = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        sharing, common, total = sharing + bool(shared), common + shared, total + sum(map(len, paragraphs))
    return Overlap(heldout, sharing, common / max(1, total))


def _fit_documents(config: DocumentsConfig, held_out: bool, unfit: Set[int]) -> Iterator[RawDocument]:
    source = Numbered(documents_of(config))
    return (document for document in whole_documents(source, config, held_out) if source.last[0] not in unfit)


def _paragraphs(document: RawDocument) -> Iterator[str]:
    """White space aside."""
    texts = [document] if isinstance(document, str) else [message["content"] for message in document]
    for text in texts:
        for paragraph in text.split("\n\n"):
            if len(paragraph := " ".join(paragraph.split())) >= LEAST:
                yield paragraph
