"""A disk that is really full: one line with the path, exit code 2; the same command continues once there is room.

Where no disk may be mounted, and beside it, files may not grow beyond a size, which fails in the same places.
"""

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from data_gen.traces.store import TraceStore
from tests.data_gen.flashmemory.test_import import TRACE, dump, save

CALLS = {
    "generate": [4, 60, 400, 900],
    "import": [4, 60, 500],
    "train": [4, 40, 80, 120, 200, 300],
    "export": [4, 12],
}
"""Sizes of the disk in KiB at which each verb runs out of it, at its first file or at a later one."""
LARGEST = {"generate": (1, 80), "import": (1, 60), "train": (1, 12), "export": (1, 8)}
"""Sizes of a file in KiB that each verb wants to write more than, to its first file or to a later one."""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """An empty disk of 4 KiB, which `resize` makes larger."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield path
    subprocess.run(["umount", path], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)


@pytest.mark.parametrize(("verb", "kib"), [(verb, kib) for verb, sizes in CALLS.items() for kib in sizes])
def test_a_full_disk_is_named_and_the_same_command_continues(finished, recipe, lookahead, disk, tmp_path, verb, kib):
    command = prepared(verb, finished, recipe, disk, tmp_path)
    resize(disk, kib)
    code, _, line = lookahead(*command)
    assert code == 2 and f"lookahead: {disk}" in line and "No space left on device" in line, line
    assert not list(disk.rglob(".unfinished-*"))
    kept = {path: path.read_bytes() for path in disk.rglob("doc_*")}
    resize(disk, 64 << 10)
    assert lookahead(*command)[0] == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    same_as_ever(command, finished, disk, lookahead, tmp_path)


@pytest.mark.parametrize(("verb", "kib"), [(verb, sizes[place]) for verb, sizes in LARGEST.items() for place in (0, 1)])
def test_files_that_may_not_grow_are_named_likewise(finished, recipe, lookahead, tmp_path, verb, kib):
    out = tmp_path / "out"
    command = prepared(verb, finished, recipe, out, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, hard))
    try:
        code, _, line = lookahead(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and f"lookahead: {out}" in line and "once there is room" in line, line
    assert not list(out.rglob(".unfinished-*"))
    assert lookahead(*command)[0] == 0
    same_as_ever(command, finished, out, lookahead, tmp_path)


def prepared(verb, finished, recipe, disk, tmp_path):
    """The arguments of a verb that writes to `disk`."""
    if verb == "import":
        for number in range(3):
            save(tmp_path / "dumps", number, dump(seed=number))
        settings = yaml.safe_load(recipe.read_text()) | {"trace": TRACE.model_dump(mode="json")}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings))
    return {
        "generate": ["generate", recipe, "--out", disk / "traces"],
        "import": ["import", recipe, "--dumps", tmp_path / "dumps", "--out", disk / "traces"],
        "train": ["train", recipe, "--traces", finished / "traces" / "train", "--out", disk / "run"],
        "export": ["export", "--indexer", finished / "indexer", "--out", disk / "bundle"],
    }[verb]


def same_as_ever(command, finished, disk, lookahead, tmp_path):
    """What was written in the end has the bytes of a run that always had room."""
    roomy = tmp_path / "roomy"
    if command[0] != "generate":
        assert lookahead(*command[:-1], roomy)[0] == 0
    ours, theirs = {
        "generate": (disk / "traces" / "train", finished / "traces" / "train"),
        "import": (disk / "traces", roomy),
        "train": (disk / "run" / "indexer", roomy / "indexer"),
        "export": (disk / "bundle", roomy),
    }[command[0]]
    assert command[0] != "import" or len(TraceStore.open(ours)) == 3
    for path in sorted(theirs.rglob("*.*")):
        if path.suffix in {".safetensors", ".json"} and path.name != "calibration.json":
            assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes(), path.name
