"""Artefacts that are changed and fed to the verbs, a function a kind."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.calls import Outcome
from tests.fuzz.cases import FIRST, HELDOUT, HONOURED, REFUSED, TRAIN, Case, artefact, changed, files_of
from tests.fuzz.mutations import edit_file, edit_folder
from tests.fuzz.world import World, recipe

COPIES = ["doc_0000999", "doc_0000003-old", "doc_0000003 (copy)"]
"""Names of files that no document of a store has."""
HELD_BACK = "doc_0000003.safetensors"
"""What validation is measured on: its negatives are no training's."""


def store(world: World, folder: Path, rng: Random) -> Case:
    """A trace store, to inspect alone and beside the other one, and to train on or evaluate."""
    side = rng.choice([TRAIN, HELDOUT])
    part = world.lay_out(folder, side)
    traced = min(part.rglob("doc_*")).parent
    documents = list(part.rglob("doc_*"))
    what = changed(part, rng, lambda path: traced / f"{rng.choice(COPIES)}.safetensors")
    use = ["train", FIRST, "--out", "new"] if side == TRAIN else _evaluate("run/indexer")
    calls = [["inspect", side], [*use, "--traces", side], ["inspect", "run/traces"]]
    if what and not all(path.exists() for path in documents):
        others = len(list((folder / "run/traces").glob("*/*/doc_*")))
        return Case(what, calls, _unfinished(side, len(documents), others + 1))
    return artefact(what, side, *calls)


def _unfinished(name: str, documents: int, planned: int) -> Callable[[list[Outcome]], str]:
    """Of a store without one of its documents: `inspect` says that it is missing, who wants them all refuses."""

    def judge(outcomes: list[Outcome]) -> str:
        looked, used, progress = outcomes
        missing = f"1 of {documents} documents" in looked.printed
        if looked.code or progress.code or not missing or f"{planned - 1} of {planned} doc" not in progress.printed:
            return "silent: `inspect` does not say that a document is missing"
        if not used.refused:
            return "silent: a store that lacks a document is used"
        said = f"{name}: 1 of {documents} documents are missing"
        return REFUSED if said in used.reason else f"nameless: {used.reason[:200]}"

    return judge


def _evaluate(indexer: str) -> list[str]:
    return ["evaluate", FIRST, "--indexer", indexer, "--out", "new"]


def negatives(world: World, folder: Path, rng: Random) -> Case:
    """Mined negatives beside a store, to train on."""
    what = changed(world.lay_out(folder, "mined") / "hard_negatives", rng, kept=HELD_BACK)
    return artefact(
        what, "hard_negatives", ["inspect", "mined"], ["train", recipe("hard"), "--traces", "mined", "--out", "new"]
    )


def indexer(world: World, folder: Path, rng: Random) -> Case:
    """A trained indexer, to inspect and to use in any of the ways there are."""
    path = "run/indexer"
    part = world.lay_out(folder, path, TRAIN)  # which mined negatives are written into
    what = changed(part, rng, lambda path: path.with_name(f"more-{path.name}"))
    use = rng.choice(
        [
            [*_evaluate(path), "--traces", HELDOUT],
            ["export", "--indexer", path, "--out", "new"],
            ["calibrate", FIRST, "--indexer", path, "--traces", HELDOUT],
            ["mine", FIRST, "--indexer", path, "--traces", TRAIN],
            ["verify", "--indexer", path, "--traces", HELDOUT],
            ["select-layers", "--indexer", path, "--traces", HELDOUT, "--count", "1"],
        ]
    )
    return artefact(what, path, ["inspect", path], use)


def bundle(world: World, folder: Path, rng: Random) -> Case:
    """An exported bundle, to inspect and to decode or verify with."""
    path = "run/bundle"
    what = changed(world.lay_out(folder, path), rng)
    decode = ["decode", FIRST, "--bundle", path, "--prompt", "texts/00.txt", "--out", "new", "--new-tokens", "2"]
    verify = ["verify", "--indexer", path, "--traces", HELDOUT]
    return artefact(what, path, ["inspect", path], rng.choice([decode, verify]))


def checkpoint(world: World, folder: Path, rng: Random) -> Case:
    """A run that goes on from its checkpoints: refused, or the same indexer to the last bit."""
    half = world.lay_out(folder, "half")
    within = rng.choice([*sorted(half.glob("checkpoints/checkpoint-*")), half])
    if within != half:
        what = changed(within, rng)
        name = str(within.relative_to(folder))
    else:
        name, what = "", edit_file(half / "training.json", rng)
    calls = [["inspect", name]] * bool(name) + [["train", FIRST, "--traces", TRAIN, "--out", "half"]]

    def judge(outcomes: list[Outcome]) -> str:
        if name and not outcomes[0].refused:
            return "silent: a changed checkpoint is whole to `inspect`"
        if outcomes[-1].refused:
            return REFUSED
        same = files_of(half / "indexer") == files_of(world.root / "run/indexer")
        return HONOURED if same else "silent: resumed to another indexer"

    return Case(f"{name}: {what}", calls, judge) if what else Case.nothing()


def release(world: World, folder: Path, rng: Random) -> Case:
    """Checkpoints of the release, which hold no checksum: `inspect` and `convert` read them, or refuse."""
    name = rng.choice(["release.pt", "release.safetensors"])
    what = edit_file(world.lay_out(folder, name), rng)
    calls = [["inspect", name], ["convert", name, "--out", "new"]]

    def judge(outcomes: list[Outcome]) -> str:
        looked, converted = outcomes
        if looked.refused and not converted.refused:
            return f"silent: converted, though `inspect` refuses it: {looked.reason[:200]}"
        return REFUSED if converted.refused else HONOURED

    return Case(what, calls, judge)


def dumps(world: World, folder: Path, rng: Random) -> Case:
    """The release's traces, which hold no checksum: what is imported is whole."""
    part = world.lay_out(folder, "dumps")
    what = edit_folder(sorted(part.iterdir()), rng, lambda path: path.with_name(f"doc_00007{path.suffix}"))
    calls = [["import", recipe("import"), "--dumps", "dumps", "--out", "new", "--strict"], ["inspect", "new"]]

    def judge(outcomes: list[Outcome]) -> str:
        if list((folder / "new").rglob("doc_*")) and outcomes[1].refused:
            return "silent: what was imported is damaged"
        return REFUSED if outcomes[0].refused else HONOURED

    return Case(what, calls, judge)
