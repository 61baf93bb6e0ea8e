"""The answers of one process of `benchmarks.peers`, in either environment: a JSON line each, on disk when added."""

import json
import os
from pathlib import Path
from typing import Any

WARM_STEPS = 20
"""Tokens read before anything is timed, more than a chunk and a page of `benchmarks.peers` have."""


def begun(asked: dict[str, Any]) -> dict[str, Any]:
    """The beginning of what is timed: the first steps of a method set up what later ones find."""
    return asked | {"given": asked["given"][:WARM_STEPS]}


class AnswerFile:
    """An append-only file; half a line, which a killed run may leave, is cut off when it is opened.

    done: (name, method) of the answers in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        self.done = {(each["name"], each["method"]) for each in map(json.loads, whole.splitlines())}
        with path.open("ab") as file:
            file.truncate(len(whole))

    def add(self, name: str, method: str, answer: dict[str, Any]) -> None:
        """Keep what became of one question or text under one method."""
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name, "method": method} | answer) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add((name, method))
