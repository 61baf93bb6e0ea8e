"""Inputs that are changed and fed to the verbs, a function a kind: models, documents, recipes."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import yaml
import zstandard

from data_gen.core.errors import InputError
from data_gen.text.sources import read_source
from indexer_train.load import load_indexer, open_traces
from recipes import load_recipe
from tests.fuzz.calls import Outcome
from tests.fuzz.cases import FIRST, HONOURED, REFUSED, TRAIN, Case, changed, files_of
from tests.fuzz.mutations import edit_bytes, edit_file, edit_folder, edit_value
from tests.fuzz.world import SOURCES, World, recipe

LONG_TRAINING = 20
"""Epochs: what a recipe with more asks for is done, later than anybody waits here."""


def backbone(world: World, folder: Path, rng: Random) -> Case:
    """A model's folder changed while traces are made of it: refused, or the same traces to the last bit."""
    what = changed(world.lay_out(folder, "model", "begun/texts.jsonl"), rng)
    return _continued(world, folder, rng, "texts.jsonl", what)


def document(world: World, folder: Path, rng: Random) -> Case:
    """Documents changed while traces are made of them: refused, or the same traces; read as they are, or refused."""
    name = rng.choice(list(SOURCES))
    source = world.lay_out(folder, name, f"begun/{name}")
    before = files_of(folder / name) if source.is_dir() else source.read_bytes()
    if source.is_dir():
        what = edit_folder(sorted(source.iterdir()), rng, lambda path: path.with_name("0.txt"))
        same = files_of(source) == before
    else:
        what = _edit_rows(source, rng)
        same = source.read_bytes() == before
    return _continued(world, folder, rng, name, None if same else what, source)


def _edit_rows(source: Path, rng: Random) -> str:
    """Change rows of a file, or its bytes."""
    lines = source.read_bytes().splitlines(keepends=True)
    if source.suffix != ".jsonl" or rng.random() < 0.3:
        return edit_file(source, rng)
    at = rng.randrange(len(lines))
    what = rng.choice(["gone", "twice", "moved", "another", "changed", "value"])
    row = lines[at]
    if what == "gone":
        del lines[at]
    elif what == "twice":
        lines.insert(rng.randrange(len(lines)), row)
    elif what == "moved":
        lines.insert(rng.randrange(len(lines)), lines.pop(at))
    elif what == "another":
        lines.insert(at, row.replace(b"a", b"o"))
    elif what == "changed":
        lines[at] = edit_bytes(row, rng)[0]
    else:
        value, _, _ = edit_value(json.loads(row), rng)
        lines[at] = json.dumps(value).encode() + b"\n"
    source.write_bytes(b"".join(lines))
    return f"{source.name} row {at}: {what}"


def _continued(
    world: World, folder: Path, rng: Random, name: str, what: str | None, source: Path | None = None
) -> Case:
    """The last document of either side of the traces of `name` is made again, of changed input."""
    if what is None:
        return Case.nothing()
    begun = folder / "begun" / name
    for side in ("train", "heldout"):
        sorted((begun / side).rglob("doc_*"))[-1].unlink()
    short = files_of(begun)

    def judge(outcomes: list[Outcome]) -> str:
        if outcomes[0].refused:
            if files_of(begun) != short:
                return "half: refused when something had been written"
        elif files_of(begun) != files_of(world.root / "begun" / name):
            return "silent: other traces than those that were begun"
        if source is not None and (fault := _misread(source)):
            return fault
        return REFUSED if outcomes[0].refused else HONOURED

    return Case(what, [["generate", recipe(name), "--out", f"begun/{name}"]], judge)


def _misread(source: Path) -> str | None:
    """What `read_source` gives beside what the file says to a reader that knows whole files alone."""
    if source.is_dir() or source.suffix == ".parquet":
        return None
    try:
        told = list(read_source(str(source), "text"))
    except InputError as error:
        return None if source.name in str(error) else f"nameless: {str(error)[:200]}"
    try:
        rows = _rows(source)
    except (ValueError, OSError, EOFError, RecursionError, zstandard.ZstdError) as error:
        return f"silent: a damaged file is read ({type(error).__name__})"
    plain = [row.get("text") or row.get("messages") for row in rows if isinstance(row, dict)]
    if len(plain) != len(told) or any(
        isinstance(row, str) and row != text for row, text in zip(plain, told, strict=True)
    ):
        return "silent: other documents than the file's"
    return None


def _rows(source: Path) -> list[Any]:
    content = source.read_bytes()
    if source.suffix == ".gz":
        content = gzip.decompress(content)
    if source.suffix == ".zst":
        content = zstandard.ZstdDecompressor().decompress(content, max_output_size=1 << 26)
    if source.suffix == ".json":
        return json.loads(content.decode("utf-8-sig"))
    # Of files that were joined, a row in the middle may begin with a mark of byte order.
    return [json.loads(line.decode("utf-8-sig")) for line in content.split(b"\n") if line.strip()]


def recipes(world: World, folder: Path, rng: Random) -> Case:
    """A recipe: refused, or done as it says."""
    path = world.lay_out(folder, FIRST)
    content = yaml.safe_load(path.read_bytes())
    place: tuple[Any, ...] = ()
    if rng.random() < 0.8:
        edited, place, what = edit_value(load_recipe(str(path)).model_dump(mode="json") | content, rng)
        path.write_text(yaml.safe_dump(edited))
    else:
        edited, what = edit_bytes(path.read_bytes(), rng)
        path.write_bytes(edited)
    calls = [["generate", FIRST, "--out", "new"]]
    try:
        asked = load_recipe(str(path))
        if place[:1] in [("train",), ("indexer",)] and asked.train.epochs <= LONG_TRAINING:
            calls = [["train", FIRST, "--traces", TRAIN, "--out", "new"]]
    except InputError:
        asked = None  # the verb will say so

    def judge(outcomes: list[Outcome]) -> str:
        if outcomes[0].refused:
            return REFUSED
        if asked is None:
            return "silent: a recipe that cannot be read is done"
        said = yaml.safe_load(path.read_bytes())
        if fault := _ignored(said, asked.model_dump(), ()):
            return f"silent: {fault}"
        if calls[0][0] == "train":
            spec = load_indexer(folder / "new" / "indexer").spec
            return HONOURED if spec.shape == asked.indexer else "silent: trained with another shape"
        made = open_traces(folder / "new" / "train", [])
        count = sum(asked.documents.train.values())
        told = {name: made.manifest.documents.get(name, value) for name, value in _plain(asked.documents).items()}
        if made.manifest.trace != asked.trace or told != _plain(asked.documents) or len(made) != count:
            return "silent: traced with other settings"
        return HONOURED

    return Case(what, calls, judge)


def _plain(documents: Any) -> dict[str, Any]:
    return documents.model_dump(mode="json")


def _ignored(said: Any, read: Any, place: tuple[Any, ...]) -> str | None:
    """The first value of a YAML tree that is another one in the settings that were read of it."""
    if isinstance(said, dict) and isinstance(read, dict):
        found = (_ignored(value, read.get(key), (*place, key)) for key, value in said.items())
        return next(filter(None, found), None)
    if isinstance(said, list) and isinstance(read, list | tuple) and len(said) == len(read):
        found = (_ignored(*pair, (*place, number)) for number, pair in enumerate(zip(said, read, strict=True)))
        return next(filter(None, found), None)
    same = said == read or str(said) == str(read) or (isinstance(said, str) and _number(said) == read)
    return None if same else f"{'.'.join(map(str, place))}: {said!r} is read as {read!r}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
