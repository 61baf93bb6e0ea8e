"""The fuzz run finds what is planted, of every kind and of every sort of fault, and nothing where nothing is."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from pydantic import ValidationError

from data_gen.core.errors import InputError
from data_gen.flashmemory.unpickle import _TensorUnpickler
from data_gen.text.rows import read_lines
from indexer_train.load import open_traces
from recipes import Recipe
from tests.fuzz import __main__ as command
from tests.fuzz.calls import call, call_in_process
from tests.fuzz.kinds import KINDS
from tests.fuzz.runner import Results, fuzz, try_case
from tests.fuzz.world import build

PATIENCE = 60
"""Cases within which a planted fault must be found."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world"))


def found(world, kind, limit=60.0):
    """The first fault of a kind, and the number of its case."""
    results = Results()
    for number in range(PATIENCE):
        try_case(world, 0, kind, number, results, limit)
        if results.faults:
            return results.faults[0]["fault"], number
    raise AssertionError(f"nothing found: {results.counts}")


def any_seal(path, head, place):
    """In place of the checksum of a file: whatever it holds."""
    return head[slice(*place)].decode()


def any_bundle(spec, weights):
    return json.loads((weights.parent / "bundle.json").read_bytes()).get("sha256", "")


def without_bad_rows(*of):
    return (row for row in read_lines(*of) if not isinstance(row, InputError))


def read_or_default(content, whole=Recipe.model_validate):
    """In place of the reader of recipes: what is wrong with one is left out."""
    try:
        return whole(content)
    except ValidationError as error:
        wrong = error.errors()[0]["loc"]
        return read_or_default({**content, wrong[0]: left_out(content[wrong[0]], wrong[1:])})


def left_out(section, place):
    if len(place) == 1:
        return {name: value for name, value in section.items() if name != place[0]}
    return section | {place[0]: left_out(section[place[0]], place[1:])}


def planted(world, kind):
    """What takes a check of this kind away."""
    if kind in ("stores", "negatives"):
        return [patch("data_gen.core.files._digest", any_seal)]
    if kind == "indexers":
        return [patch("indexer_train.load.folder_damage", lambda folder: None)]
    if kind == "bundles":
        return [patch("indexer_train.formats.bundle._checksum", any_bundle)]
    if kind == "checkpoints":
        return [patch(f"indexer_train.{room}.folder_damage", lambda folder: None) for room in ("checkpoints", "load")]
    if kind == "backbones":
        value = open_traces(world.root / "run/traces/train", []).manifest.backbone.fingerprint
        return [patch("data_gen.backbones.dense.fingerprint", lambda tensors: value)]
    if kind == "documents":
        return [patch("data_gen.text.sources.read_lines", without_bad_rows)]
    if kind == "recipes":
        return [patch.object(Recipe, "model_validate", read_or_default)]
    if kind == "dumps":
        return [patch("data_gen.flashmemory.folder.load_dump", lambda path: _TensorUnpickler(path.open("rb")).load())]
    return [patch("indexer_train.formats.flashmemory.whole", lambda *_: contextlib.nullcontext())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_that_is_gone_is_found(world, kind):
    with contextlib.ExitStack() as stack:
        for each in planted(world, kind):
            stack.enter_context(each)
        fault, number = found(world, kind)
    assert fault.split(":")[0] == ("traceback" if kind in ("release", "dumps") else "silent")
    results = Results()
    try_case(world, 0, kind, number, results)
    assert sum(results.counts[kind].values()) == 1 and not results.faults  # it is the check that was missing


def for_ever(folder):
    while True:
        pass


@pytest.mark.parametrize("hang", [for_ever, lambda folder: time.sleep(600)], ids=["at work", "asleep"])
def test_a_hang_is_found(world, hang):
    with patch("indexer_train.artefacts.load_bundle", hang):
        fault, _ = found(world, "bundles", limit=0.5)
    assert fault.startswith("hang: more than 0.5 s")


def test_a_hang_in_a_process_of_its_own_is_found(world, monkeypatch):  # torch takes longer to import
    monkeypatch.setattr("tests.fuzz.calls.BEGINNING", 0)
    outcome = call_in_process(["inspect", str(world.root / "run/bundle")], seconds=0.1)
    assert outcome.fault == "hang: more than 1 s in a process of its own"


def test_more_than_a_line_is_found(world):
    with patch("data_gen.core.files.one_line", lambda error: "two\nlines"), patch("cli._one_line", str):
        fault, _ = found(world, "stores")
    assert fault.split(":")[0] in ("no line", "more than a line")


def test_half_of_what_was_refused_is_found(world):
    def left_behind(name, start, field):
        path = Path(name)
        (path.parent / "begun" / path.name / "train" / "doc_00004.safetensors").write_bytes(b"")
        return read_lines(name, start, field)

    with patch("data_gen.text.sources.read_lines", left_behind):
        fault, _ = found(world, "documents")
    assert fault.split(":")[0] in ("half", "silent")


def test_a_document_that_nobody_misses_is_found(world):
    with patch("data_gen.traces.store.TraceStore.missing", lambda store: []):
        fault, _ = found(world, "stores")
    assert fault == "silent: `inspect` does not say that a document is missing"


@pytest.mark.parametrize("reason", ["", " and more"])
def test_what_only_a_process_of_its_own_says_is_found(world, monkeypatch, reason):
    def apart(arguments, seconds):
        outcome = call(arguments, seconds)
        return replace(outcome, complained=outcome.complained.rstrip() + reason)

    monkeypatch.setattr("tests.fuzz.runner.call_in_process", apart)
    results = Results()
    try_case(world, 0, "negatives", 0, results, apart=True)
    assert [fault["fault"].split(":")[0] for fault in results.faults] == ["unlike"] * bool(reason)


def test_a_few_seconds_find_nothing(world):
    results = fuzz(world, seed=1, seconds=8, sample=0)
    assert not results.faults
    assert all(sum(results.counts[kind].values()) for kind in KINDS)


@pytest.mark.parametrize("case", ["x", "stores", "stores/", "stores/x", "nothing/3"])
def test_a_case_that_does_not_exist_is_refused_before_anything_is_built(monkeypatch, capsys, case):
    monkeypatch.setattr(command, "build", None)
    monkeypatch.setattr("sys.argv", ["fuzz", "--case", case])
    with pytest.raises(SystemExit):
        command.main()
    assert f"error: --case {case}: give KIND/NUMBER" in capsys.readouterr().err
