"""A case of fuzzing: what was changed, which verbs are called on it, and what their outcomes are worth."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from tests.fuzz.calls import Outcome
from tests.fuzz.mutations import edit_folder
from tests.fuzz.world import recipe

REFUSED, HONOURED, UNCHANGED = "refused", "honoured", "unchanged"
"""What may become of a case; any other verdict is a fault, in words."""
FIRST = recipe("texts.jsonl")
TRAIN, HELDOUT = "run/traces/train", "run/traces/heldout"
CARD = "README.md"
"""Of a folder, from which nothing is computed."""


@dataclass(frozen=True)
class Case:
    """what: was changed; calls: arguments of the verbs, in order; judge: their outcomes -> a verdict."""

    what: str
    calls: list[list[str]]
    judge: Callable[[list[Outcome]], str]

    @classmethod
    def nothing(cls) -> "Case":
        """Of a change that says nothing else than before."""
        return cls("nothing", [], lambda _: UNCHANGED)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def changed(part: Path, rng: Random, copies: Callable[[Path], Path] | None = None, kept: str = CARD) -> str | None:
    """Change something below the folder `part`, but what `kept` names; None where it says the same as before."""
    before = files_of(part)
    what = edit_folder(sorted(path for path in part.rglob("*.*") if path.is_file() and path.name != kept), rng, copies)
    after = files_of(part)
    return None if {k: _said(k, v) for k, v in after.items()} == {k: _said(k, v) for k, v in before.items()} else what


def _said(name: str, content: bytes) -> Any:
    """What a file says: of a bundle's header no white space, of a backbone's weights what bf16 can tell."""
    try:
        if name == "bundle.json":
            return json.dumps(json.loads(content), sort_keys=True)
        if name == "model.safetensors":
            tensors = safetensors.torch.load(content)
            return {key: (value.shape, value.bfloat16().view(torch.int16).tolist()) for key, value in tensors.items()}
    except Exception:  # of whatever became of it
        return content
    return content


def artefact(what: str | None, name: str, *calls: list[str]) -> Case:
    """Every verb must refuse it and name something of `name`; what: None where it is unchanged."""
    if what is None:
        return Case.nothing()
    return Case(what, list(calls), _all_refuse(name))


def _all_refuse(name: str) -> Callable[[list[Outcome]], str]:
    def judge(outcomes: list[Outcome]) -> str:
        for outcome in outcomes:
            if not outcome.refused:
                return "silent: a changed artefact is accepted"
            if name not in outcome.reason:
                return f"nameless: {outcome.reason[:200]}"
        return REFUSED

    return judge
