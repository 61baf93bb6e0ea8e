"""Raw text from a folder, a JSONL or Parquet file, a `datasets` name, the interpreter or an installed package."""

import ast
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from data_gen.config import DocumentsConfig
from data_gen.core.errors import InputError
from data_gen.core.files import package_folder

RawDocument = str | list[dict[str, str]]
"""Plain text, or the messages of a chat ({role, content} each)."""
WHOLE = ("document", "chat")
"""Tasks that read a source's documents as they are; the others pack its paragraphs to a length."""
TEXT_FILES = {".txt", ".md", ".markdown", ".rst"}
"""What is read of a folder."""
LEAST = 80
"""Characters of a paragraph that counts: headings and thanks are everybody's."""


def read_source(source: str, text_field: str) -> Iterator[RawDocument]:
    """Raw documents of `source` in a fixed order. Raises InputError for a missing, empty or malformed one."""
    path = Path(source).expanduser()
    kind = next(kind for kind in SOURCES.values() if kind.takes(source, path))
    documents = kind.read(source, path, text_field)
    found = False
    for document in documents:
        found = True
        if not document or (isinstance(document, str) and not document.strip()):
            raise InputError(f"documents {source}: an empty document")
        yield document
    if not found:
        raise InputError(f"documents {source}: no document there")


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
                raise InputError(f"documents {file}: not Python in an encoding that it names") from error
            if text.strip():  # many packages begin with an empty __init__.py
                yield text


def _folder(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in TEXT_FILES and file.is_file():
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"documents {file}: not UTF-8 text") from error
            if not text.strip():
                raise InputError(f"documents {file}: an empty document")
            yield text


def _jsonl(path: Path, text_field: str) -> Iterator[RawDocument]:
    with open(_existing(path), "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InputError(f"documents {path} line {number}: not JSON in UTF-8") from error
            yield _content(row, text_field, f"{path} line {number}")


def _datasets(name: str, text_field: str, where: str, data_files: str | None = None) -> Iterator[RawDocument]:
    """where: what the user called it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    number = 0
    try:
        rows = load_dataset(name, split="train", streaming=True, data_files=data_files)
        for number, row in enumerate(rows, 1):
            yield _content(row, text_field, f"{where} row {number}")
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if data_files or number:
            raise InputError(f"documents {where}: cannot be read after row {number} ({reason})") from error
        raise InputError(f"documents {where}: no such file or folder, and no data set either ({reason})") from error


def _content(row: object, text_field: str, where: str) -> RawDocument:
    content = row.get(text_field, row.get("messages")) if isinstance(row, dict) else None
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in content
    ):
        return content
    raise InputError(f"documents {where}: needs a text field {text_field!r} or chat `messages` of role and content")


@dataclass(frozen=True)
class SourceKind:
    """One kind of place that text comes from.

    takes: (source, the same as a path) -> whether it is one; read: (source, path, text_field) -> its raw documents, in
    a fixed order.
    """

    takes: Callable[[str, Path], bool]
    read: Callable[[str, Path, str], Iterator[RawDocument]]


def _read_package(source: str, path: Path, text_field: str) -> Iterator[str]:
    return _code(package_folder(source.removeprefix("package:"), f"documents {source}"))


def _read_parquet(source: str, path: Path, text_field: str) -> Iterator[RawDocument]:
    return _datasets("parquet", text_field, str(_existing(path)), data_files=str(path))


def _refuse(source: str, path: Path, text_field: str) -> Iterator[RawDocument]:
    raise InputError(f"documents {_existing(path)}: expected a folder, .jsonl or .parquet")


SOURCES: dict[str, SourceKind] = {
    "builtin": SourceKind(lambda source, path: source == "builtin", lambda *_: _builtin()),
    "stdlib": SourceKind(lambda source, path: source == "stdlib", lambda *_: _code(Path(sysconfig.get_path("stdlib")))),
    "package": SourceKind(lambda source, path: source.startswith("package:"), _read_package),
    "folder": SourceKind(lambda source, path: path.is_dir(), lambda source, path, field: _folder(path)),
    "jsonl": SourceKind(lambda source, path: path.suffix == ".jsonl", lambda source, path, field: _jsonl(path, field)),
    "parquet": SourceKind(lambda source, path: path.suffix == ".parquet", _read_parquet),
    "other": SourceKind(
        lambda source, path: path.exists() or path.suffix.lower() in TEXT_FILES or source.startswith((".", "/", "~")),
        _refuse,
    ),
    "datasets": SourceKind(lambda source, path: True, lambda source, path, field: _datasets(source, field, source)),
}
"""Every kind of source; the first that takes a source reads it."""


def split_paragraphs(documents: Iterable[str], heldout_share: float) -> Iterator[tuple[bool, list[str]]]:
    """(held out?, paragraphs) of each document, every paragraph given once in the whole source.

    A document's side is decided by a hash of its text, so it does not depend on what else is read; paragraphs that
    repeat (white space aside) stay with the first document that has them, so the sides never share text.
    """
    seen: set[bytes] = set()
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if paragraph.strip() and key not in seen:
                paragraphs.append(paragraph.strip("\n"))
            seen.add(key)
        if paragraphs:
            yield int.from_bytes(digest[:4], "big") / 2**32 < heldout_share, paragraphs


def whole_documents(config: DocumentsConfig) -> Iterator[RawDocument]:
    """The source's documents for the tasks of WHOLE: first those to train on, then the held-out ones."""
    return _once(read_source(config.source, config.text_field))


def _once(documents: Iterable[RawDocument]) -> Iterator[RawDocument]:
    """Each document once, white space aside: a copy must not be in training and held-out documents alike."""
    seen: set[str] = set()
    for document in documents:
        key = " ".join(json.dumps(document).replace("\\n", " ").split())
        if key not in seen:
            seen.add(key)
            yield document


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


def measure_overlap(config: DocumentsConfig) -> Overlap:
    """Of the documents and chats that are read whole; of packed text it is none."""
    training, heldout = (sum(tasks.get(task, 0) for task in WHOLE) for tasks in (config.train, config.heldout))
    if not training or not heldout:
        return Overlap(heldout, 0, 0.0)
    documents = whole_documents(config)
    seen = {paragraph for document in islice(documents, training) for paragraph in _paragraphs(document)}
    sharing = common = total = 0
    for document in islice(documents, heldout):
        paragraphs = list(_paragraphs(document))
        shared = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        sharing, common, total = sharing + bool(shared), common + shared, total + sum(map(len, paragraphs))
    return Overlap(heldout, sharing, common / max(1, total))


def _paragraphs(document: RawDocument) -> Iterator[str]:
    """White space aside."""
    texts = [document] if isinstance(document, str) else [message["content"] for message in document]
    for text in texts:
        for paragraph in text.split("\n\n"):
            if len(paragraph := " ".join(paragraph.split())) >= LEAST:
                yield paragraph
