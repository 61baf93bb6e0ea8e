"""Sealed files and folders: every byte that changes is told; what is replaced, killed or left over harms nothing."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_gen.core.errors import InputError
from data_gen.core.files import (
    BLANK,
    alone,
    broken_seal,
    folder_damage,
    one_line,
    read_sealed,
    replace_sealed,
    save_tensors,
    seal_folder,
    sweep,
    whole,
    write_atomically,
    write_sealed,
)

ROOT = Path(__file__).parents[3]
TENSORS = {"b": torch.arange(12).view(3, 4), "a": torch.ones(5, dtype=torch.bfloat16)}


def flipped(content, place, bit):
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_byte_of_a_sealed_file_counts(tmp_path, suffix):
    path = tmp_path / f"one{suffix}"
    if suffix == ".json":
        write_sealed(path, {"last": 48, "checksum of another": '"checksum": "' + BLANK + '"'})
    else:
        save_tensors(TENSORS, path, {"document": json.dumps({"last": 48, "checksum": BLANK})})
    assert broken_seal(path) is None
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(flipped(content, place, random.Random(place).randrange(8)))
        assert broken_seal(path) is not None, place
    for other in (content[:-1], content + b"\0", b"", content.replace(b'"checksum"', b'"checksun"')):
        path.write_bytes(other)
        assert broken_seal(path) is not None


def test_a_sealed_file_reads_back_and_has_the_same_bytes_whatever_the_order(tmp_path):
    save_tensors(TENSORS, tmp_path / "one.safetensors", {"x": "1", "y": "2", "w": "3"})
    save_tensors(dict(reversed(TENSORS.items())), tmp_path / "two.safetensors", {"w": "3", "y": "2", "x": "1"})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert torch.equal(load_file(tmp_path / "one.safetensors")["b"], TENSORS["b"])
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert {name: file.metadata()[name] for name in "wxy"} == {"w": "3", "x": "1", "y": "2"}
    write_sealed(tmp_path / "one.json", {"a": [1, None, "\ud83d"]})
    assert read_sealed(tmp_path / "one.json") == {"a": [1, None, "\ud83d"]}
    (tmp_path / "one.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="checksum is missing"):
        read_sealed(tmp_path / "one.json")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "spec.json").write_text("one")
    (tmp_path / "weights.bin").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("card")
    seal_folder(tmp_path)
    return tmp_path


def test_every_byte_of_a_sealed_folder_counts_but_the_card(folder):
    assert folder_damage(folder) is None
    for file in ("part/spec.json", "weights.bin", "checksums.json"):
        content = (folder / file).read_bytes()
        for place in range(len(content)):
            (folder / file).write_bytes(flipped(content, place, place % 8))
            assert folder_damage(folder) == f"{file} is not the one that was written"
        (folder / file).unlink()
        assert folder_damage(folder) == f"{file} is missing"
        (folder / file).write_bytes(content)
    (folder / "README.md").write_text("another card")
    (folder / ".unfinished-1.json").write_text("of a run that was killed")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "of the hub").write_text("")
    assert folder_damage(folder) is None
    (folder / "part" / "more.bin").write_bytes(b"")
    assert folder_damage(folder) == "part/more.bin was added"


def test_a_file_is_replaced_whenever_the_run_is_killed(folder, monkeypatch):
    """Every step of the replacement fails once; the folder is whole each time, with the old file or the new one."""
    step, calls = 0, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == step:
            raise KeyboardInterrupt
        return rename(*arguments)

    rename = os.replace
    monkeypatch.setattr(os, "replace", killed)
    found = []
    for step in (1, 2, 3):  # the announcement, the file, the final checksums
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            replace_sealed(folder / "part/spec.json", folder, lambda file: file.write_text(f"new {step}"))  # noqa: B023
        assert folder_damage(folder) is None
        found.append((folder / "part/spec.json").read_text())
    assert found == ["one", "one", "new 3"]
    step = 0
    replace_sealed(folder / "part/spec.json", folder, lambda file: file.write_text("last"))
    assert folder_damage(folder) is None
    (folder / "part/spec.json").write_text("new 3")
    assert folder_damage(folder) == "part/spec.json is not the one that was written"


def test_who_waited_for_a_lock_that_is_gone_still_keeps_others_out(tmp_path, monkeypatch):
    """The second waits for the first, whose file goes when it has done; the third comes when there is none."""
    waiting, inside, enough = threading.Semaphore(0), [], threading.Event()
    lock = fcntl.flock

    def noted(file, how):
        waiting.release()
        return lock(file, how)

    def work(name):
        with alone(tmp_path):
            inside.append(name)
            assert enough.wait(60)

    monkeypatch.setattr(fcntl, "flock", noted)
    with ThreadPoolExecutor() as workers:
        with alone(tmp_path):
            assert waiting.acquire(timeout=60)
            second = workers.submit(work, "second")
            assert waiting.acquire(timeout=60)
            time.sleep(0.1)  # it waits now
        deadline = time.monotonic() + 60
        while not inside and time.monotonic() < deadline:
            time.sleep(0.01)
        third = workers.submit(work, "third")
        time.sleep(0.3)
        assert inside == ["second"]
        enough.set()
        for done in (second, third):
            done.result()
    assert inside == ["second", "third"] and not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_and_what_is_being_written_stays(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from data_gen.core.files import write_atomically\n"
        "def write(file):\n    file.write_text('half'); print('there', flush=True); time.sleep(60)\n"
        f"write_atomically(Path({str(tmp_path / 'out.txt')!r}), write)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"there\n"
    sweep(tmp_path)
    assert len(list(tmp_path.glob(".unfinished-*"))) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(list(tmp_path.glob(".unfinished-*"))) == 1
    for _ in range(50):
        sweep(tmp_path)
        if not list(tmp_path.iterdir()):
            break
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_a_file_that_a_library_writes_anew_and_a_sweep_takes_is_written_again(tmp_path):
    """The new one has no lock: the writer finds it gone when it opens it once more."""
    turns = []

    def write(file):
        file.unlink()
        file.write_text(f"turn {len(turns)}")
        if not turns:
            sweep(tmp_path)
        turns.append(file)
        file.read_text()

    write_atomically(tmp_path / "out.txt", write)
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    assert len(turns) == 2 and (tmp_path / "out.txt").read_text() == "turn 1"


def test_what_else_is_missing_while_a_file_is_written_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        write_atomically(tmp_path / "out.txt", lambda file: (tmp_path / "elsewhere").read_text())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("raised", [RecursionError("deep"), ZeroDivisionError("by zero"), MemoryError(), EOFError()])
def test_whatever_a_parser_raises_is_one_line(tmp_path, raised):
    with (
        pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path))}: damaged thing \(.+\); mend it$"),
        whole(tmp_path, "thing", "mend it"),
    ):
        raise raised


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("Error(s) in loading:\n\tsize mismatch\n\tmore"), "Error(s) in loading: size mismatch"),
        (ValueError("first\nsecond"), "first"),
        (ValueError("ends:"), "ends:"),
        (KeyError("x"), "'x' is missing"),
        (EOFError(), "EOFError"),
    ],
)
def test_one_line_says_what_a_heading_only_announces(error, line):
    assert one_line(error) == line


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    def broken(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "one", broken)
    assert not list(tmp_path.iterdir())
