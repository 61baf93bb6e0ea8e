"""What lies at a path: any artefact of the toolkit, or a checkpoint of the FlashMemory release, read whole."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_gen.core.errors import InputError
from data_gen.core.files import CHECKSUMS, RESULTS, UNFINISHED, one_line, whole
from data_gen.core.shard import ALL, Shard
from data_gen.core.tell import Progress
from data_gen.traces.failures import shards_of
from data_gen.traces.progress import PLAN, progress_of
from data_gen.traces.store import MANIFEST, TraceStore
from data_gen.traces.validate import check_document
from indexer_train.checkpoints import LAST, SETTINGS, STATE, checkpoints, damage
from indexer_train.data.hard_negatives import FOLDER, HardNegatives
from indexer_train.formats.bundle import HEADER, WEIGHTS, load_bundle
from indexer_train.formats.flashmemory import read_checkpoint
from indexer_train.load import load_indexer
from indexer_train.model import MemoryIndexer

ROLES = {
    "model.safetensors": "weights",
    WEIGHTS: "weights",
    "spec.json": "spec",
    "README.md": "model card",
    CHECKSUMS: "checksums",
    LAST: "what the loss learned",
    "optimizer.pt": "state of the optimizer",
    "scheduler.pt": "state of the learning rate",
}
"""Files of an artefact; others go by their names."""


@dataclass
class Found:
    """kind: of artefact; facts: (name, value) in the order to print; damage: one line for each thing that is broken."""

    kind: str
    facts: list[tuple[str, Any]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.facts), default=0)
        return "\n".join([self.kind, *(f"  {name.ljust(width)}  {value}" for name, value in self.facts)])


def inspect(path: Path, progress: Progress, shard: Shard = ALL) -> Found:
    """Recognise what lies at `path` and check all of it; a file is described by the artefact that it is part of.

    shard: of a trace store, the documents to check. Raises InputError when it is nothing that is known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if shard.count > 1:
        return _store(path, progress, TraceStore.open(path, partial=True).shard(shard).paths())
    if path.is_file():
        return _file(path, progress)
    for marker, describe in KINDS.items():
        if (path / marker).exists():
            return describe(path, progress)
    if (here := path.absolute()).name == FOLDER and (here.parent / MANIFEST).exists():
        return _hard_negatives(TraceStore.open(here.parent, partial=True))
    if stores := [marker.parent for marker in sorted(path.glob(f"*/{MANIFEST}"))]:
        return _stores(stores, progress)
    if checkpoints(path):
        return _checkpoints(path)
    if files := sorted(path.glob("ckpt_l*.pt")):
        return _layer_files(files)
    raise InputError(f"{path}: neither traces, an indexer, a bundle, a run, results, nor a checkpoint")


def _file(path: Path, progress: Progress) -> Found:
    """Of an artefact whose folder lies one or two above, or a checkpoint of the release."""
    if path.name in KINDS:
        return KINDS[path.name](path.parent, progress)
    above = path.absolute().parents[:2]
    if path.name.startswith("doc_"):
        if (above[1] / MANIFEST).exists():
            return _store(above[1], progress, [path.absolute()])
        if above[1].name == FOLDER and ((root := above[1].parent) / MANIFEST).exists():
            traced = root / path.absolute().relative_to(above[1])
            return _hard_negatives(TraceStore.open(root, partial=True).only([traced]))
    owner = next((folder for folder in above if any((folder / marker).exists() for marker in KINDS)), None)
    tensors = path.suffix in {".pt", ".safetensors"}
    if tensors and (owner is None or path.name not in ROLES):
        return _release(path)
    if owner is None:
        raise InputError(f"{path}: neither traces, an indexer, a bundle, a run, results, nor a checkpoint")
    found = inspect(owner, progress)
    found.kind += f": {ROLES.get(path.name, path.name)}"
    return found


def _store(root: Path, progress: Progress, only: list[Path] | None = None) -> Found:
    kind = "trace store"
    if only is not None:
        kind = f"{'document' if len(only) == 1 else f'{len(only)} documents'} of a trace store"
    found = Found(kind)
    try:
        opened = TraceStore.open(root, partial=True)
        store = opened if only is None else opened.only(only)
    except InputError as error:
        found.damage.append(str(error))
        return found
    manifest, trace, backbone = store.manifest, store.manifest.trace, store.manifest.backbone
    tasks: Counter[str] = Counter()
    lengths, rows, chunks, windows = [], 0, 0, 0
    for path in progress(store.paths(), "reading"):
        try:
            document = store.document(path)
            check_document(document, manifest)
        except InputError as error:
            found.damage.append(str(error))
            continue
        tasks[document.meta.task] += 1
        lengths.append(document.meta.length)
        rows, chunks = rows + len(document.positions), chunks + document.chunks
        windows += len(document.windows(serving=True))
    size = sum(path.stat().st_size for path in store.paths())
    found.facts = [
        ("backbone", f"{backbone.model_type}, fingerprint {backbone.fingerprint}"),
        ("layers", f"{trace.layers}, hidden {backbone.hidden}, keys {backbone.key} of width {backbone.key_width}"),
        ("chunks", f"of {trace.chunking.tokens} tokens; the first {trace.chunking.sink} and newest "
                   f"{trace.chunking.recent} protected"),
        ("oracle", f"{trace.oracle}, windows of {trace.window} tokens"),
        ("documents", f"{sum(tasks.values())} whole, {len(found.damage)} damaged: "
                      + ", ".join(f"{task} {count}" for task, count in sorted(tasks.items()))),
        ("from", json.dumps(manifest.documents) if manifest.documents else "not known"),
        ("tokens", f"{min(lengths)} to {max(lengths)} a document" if lengths else "-"),
        ("read", f"{rows} query tokens, {chunks} chunks, {windows} serving windows, {size / 2**20:.1f} MiB"),
    ]  # fmt: skip
    if only is None and (missing := store.missing()):
        found.facts.append(("missing", f"{len(missing)} of {len(manifest.plan)} documents{shards_of(root, missing)}"))
    if (root / FOLDER).exists() and only is None:
        try:
            found.facts.append(("hard negatives", "; ".join(HardNegatives.beside(store).made_by)))
        except InputError as error:
            found.damage.append(str(error))
    if left := [path.name for path in root.rglob(f"{UNFINISHED}*")]:
        found.facts.append(("left behind", f"{len(left)} unfinished files of a run that was killed"))
    return found


def _stores(roots: list[Path], progress: Progress) -> Found:
    """Of `lookahead generate`: train and heldout."""
    found = Found("trace stores")
    for root in roots:
        one = _store(root, progress)
        found.facts += [
            (f"{root.name}: {name}", value) for name, value in one.facts if name in ("documents", "missing", "read")
        ]
        found.damage += one.damage
    return found


def _planned(out: Path, progress: Progress) -> Found:
    """Of `lookahead generate` while it works, which is how far it is, or when it has: its stores."""
    try:
        now = progress_of(out)
    except InputError as error:
        return Found("plan of traces", damage=[str(error)])
    found = Found("plan of traces", [("planned", f"{now.documents} documents, {now.tokens} tokens"), ("traced", now)])
    if now.done < now.documents:
        return found
    stores = _stores([out / side for side in now.sides], progress)
    return Found(stores.kind, found.facts + stores.facts, stores.damage)


def _hard_negatives(store: TraceStore) -> Found:
    found = Found("hard negatives", [("documents", f"{len(store.paths())} in {store.root}")])
    try:
        found.facts += [("mined by", each) for each in HardNegatives.beside(store).made_by]
    except InputError as error:
        found.damage.append(str(error))
    return found


def _results(folder: Path, progress: Progress) -> Found:
    path = folder / RESULTS
    try:
        sections = json.loads(path.read_text()).items()
        return Found("results", [(name, f"{len(rows)} rows") for name, rows in sections if isinstance(rows, list)])
    except Exception as error:  # of JSON, or of rows that are none
        return Found("results", damage=[f"{path}: {one_line(error)}"])


def _indexer(folder: Path, progress: Progress) -> Found:
    return _model("indexer", load_indexer, folder)


def _bundle(folder: Path, progress: Progress) -> Found:
    return _model("bundle", load_bundle, folder)


def _model(kind: str, load: Callable[[Path], MemoryIndexer], folder: Path) -> Found:
    try:
        indexer = load(folder)
    except InputError as error:
        return Found(kind, damage=[str(error)])
    spec, shape = indexer.spec, indexer.spec.shape
    state = indexer.query_encoder.state_dict()
    terms = [name for name in ("scale", "slot", "bias") if getattr(shape, name)]
    terms += [f"{shape.distance_bumps} distance bumps"] if shape.distance_bumps else []
    found = Found(kind, [
        ("backbone", f"fingerprint {spec.backbone}"),
        ("layers", f"{spec.layers}, joined by {shape.join}"),
        ("shape", f"{shape.heads} heads, rank {shape.rank}, hidden {spec.hidden}, key width {spec.key_width}"),
        ("score", ", ".join(["sum of w relu(q k)", *terms])),
        ("keys", spec.key + (f", positions below {spec.rope.positions}" if spec.rope else "")),
        ("chunks", f"of {spec.chunking.tokens} tokens; the first {spec.chunking.sink} and newest "
                   f"{spec.chunking.recent} protected; windows of {spec.window} tokens"),
        ("parameters", f"{sum(value.numel() for value in state.values()):,}"),
        ("served", str(spec.selection)),
        *(("or", str(each)) for each in spec.selections[1:]),
    ])  # fmt: skip
    made = spec.provenance
    if made is not None:
        found.facts.append(
            ("trained on", f"{made.training} documents traced from {made.traced_from}, labels: {made.oracle}")
        )
        overall = [row for row in made.metrics if row.task == "all"]
        for row in overall:
            values = ", ".join(f"{name} {value:.3f}" for name, value in row.values.items())
            found.facts.append((row.data, f"{values} ({row.selection})"))
    found.damage += [
        f"{name} holds NaN or infinity" for name, value in state.items() if not bool(value.isfinite().all())
    ]
    return found


def _checkpoint(folder: Path, progress: Progress) -> Found:
    reason = damage(folder)
    if reason:
        return Found(
            "training checkpoint", damage=[f"{folder}: not whole ({reason}); training does not continue from it"]
        )
    found = _model("training checkpoint", load_indexer, folder)
    try:
        chosen_by = _chosen_by(folder)
    except InputError as error:
        found.damage.append(str(error))
        chosen_by = "checkpoint"
    with whole(folder / STATE, "checkpoint", "delete it"):
        state = json.loads((folder / STATE).read_bytes())
        best, step = state["best_metric"], state["best_global_step"]
        found.facts = [
            ("step", f"{state['global_step']} of {state['max_steps']}, epoch {state['epoch']:g}"),
            (f"best {chosen_by}", "-" if best is None else f"{best:.4f} at step {step}"),
            *found.facts,
        ]
    return found


def _chosen_by(checkpoint: Path) -> str:
    """What the run of a checkpoint keeps the best by, in words; "checkpoint" where its run is not beside it."""
    settings = checkpoint.absolute().parents[1] / SETTINGS
    if not settings.exists():
        return "checkpoint"
    with whole(settings, "settings", "train into a new folder"):
        return json.loads(settings.read_bytes())["train"]["choose"].replace("_", " ")


def _checkpoints(folder: Path) -> Found:
    found = Found("training checkpoints")
    for path in checkpoints(folder):
        reason = damage(path)
        found.facts.append((path.name, "not whole" if reason else "whole"))
        if reason:
            found.damage.append(f"{path}: not whole ({reason}); training does not continue from it")
    return found


def _run(folder: Path, progress: Progress) -> Found:
    found = Found("training run")
    if (folder / "checkpoints").exists():
        found = _checkpoints(folder / "checkpoints")
        found.kind = "training run"
    path = folder / SETTINGS
    try:
        with whole(path, "settings", "train into another folder"):
            settings = json.loads(path.read_bytes())
            train, files = settings["train"], settings["traces"]["files"]
            found.facts = [
                ("loss", f"{train['loss']}, {train['epochs']} epochs, learning rate {train['learning_rate']}"),
                ("documents", len(files)),
                *found.facts,
            ]
    except InputError as error:
        found.damage.append(str(error))
    for part in sorted(folder.glob("layer-*")):  # of a run with `one_by_one`
        one = _run(part, progress)
        own = [(name, value) for name, value in one.facts if name == "indexer" or name.startswith("checkpoint-")]
        found.facts += [(f"{part.name}: {name}", value) for name, value in own]
        found.damage += one.damage
    if (folder / "indexer").exists():
        indexer = _indexer(folder / "indexer", progress)
        found.facts += [("indexer", "finished"), *indexer.facts]
        found.damage += indexer.damage
    return found


def _layer_files(paths: list[Path]) -> Found:
    """Of `lookahead export --format flashmemory-layers`."""
    found = Found("checkpoints of the FlashMemory release, a layer each")
    for path in paths:
        try:
            one = _release(path)
            found.facts += [(f"{path.name}: {name}", value) for name, value in one.facts]
        except InputError as error:
            found.damage.append(str(error))
    return found


def _release(path: Path) -> Found:
    checkpoint = read_checkpoint(path)
    found = Found("checkpoint of the FlashMemory release")
    for ordinal, weights in checkpoint.layers.items():
        shape = f"{weights.heads} heads, rank {weights.rank}, hidden {weights.hidden}, key width {weights.width}"
        found.facts.append((f"layer {ordinal}", shape))
    table: torch.Tensor | None = checkpoint.table
    found.facts.append(("RoPE", "no table" if table is None else f"table for positions below {len(table)}"))
    return found


KINDS = {
    PLAN: _planned,
    MANIFEST: _store,
    STATE: _checkpoint,
    HEADER: _bundle,
    "modules.json": _indexer,
    SETTINGS: _run,
    RESULTS: _results,
}
"""How to describe a folder, by the file that it is known by."""
