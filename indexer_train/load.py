"""Open what training made and what it reads; nothing here needs the training loop."""

from collections.abc import Iterable
from pathlib import Path

import torch

from data_gen.core.errors import InputError
from data_gen.core.files import folder_damage, whole
from data_gen.core.rope import Rope
from data_gen.core.shard import ALL, Shard
from data_gen.traces.store import TraceStore
from data_gen.traces.types import Manifest
from data_gen.traces.validate import check_store
from indexer_train.config import IndexerConfig
from indexer_train.model import REMEDY, MemoryIndexer
from indexer_train.spec import IndexerSpec, Provenance


def load_indexer(folder: Path) -> MemoryIndexer:
    """Load a saved indexer, on the best device. Raises InputError when the folder holds none or a damaged one."""
    if not (folder / "modules.json").exists():
        raise InputError(f"{folder}: no indexer there (modules.json is missing); run `lookahead train` first")
    if reason := folder_damage(folder):
        raise InputError(f"{folder}: damaged indexer ({reason}); {REMEDY}")
    with whole(folder, "indexer", REMEDY):
        indexer = MemoryIndexer(str(folder), device="cpu", local_files_only=True)
        indexer.query_encoder.spec  # noqa: B018 - other models of sentence-transformers have none
    return indexer.to("cuda" if torch.cuda.is_available() else "cpu")


def spec_for(manifest: Manifest, shape: IndexerConfig, provenance: Provenance | None = None) -> IndexerSpec:
    """Of a new indexer of `shape` that fits traces of `manifest`, as `check_traces` checks it."""
    trace, backbone = manifest.trace, manifest.backbone
    return IndexerSpec(
        shape=shape,
        layers=trace.layers,
        hidden=backbone.hidden,
        key_width=backbone.key_width,
        chunking=trace.chunking,
        window=trace.window,
        backbone=backbone.fingerprint,
        key=backbone.key,
        rope=backbone.rope,
        provenance=provenance,
    )


def check_traces(indexer: MemoryIndexer, store: TraceStore) -> None:
    """Raise InputError unless `store` was traced from the indexer's backbone, the way its training traces were."""
    spec, manifest = indexer.spec, store.manifest
    if manifest.backbone.fingerprint != spec.backbone:
        raise InputError(f"{store.root}: traces of another backbone than the indexer's")
    if missing := sorted(set(spec.layers) - set(manifest.trace.layers)):
        raise InputError(f"{store.root}: the indexer reads layers {missing}, which the traces lack")
    backbone, trace = manifest.backbone, manifest.trace
    for what, own, theirs in (
        ("chunks", spec.chunking, trace.chunking),
        ("windows", spec.window, trace.window),
        ("hidden width", spec.hidden, backbone.hidden),
        ("keys", (spec.key, spec.key_width), (backbone.key, backbone.key_width)),
        ("RoPE", _turns(spec.rope), _turns(backbone.rope)),
    ):
        if own != theirs:
            raise InputError(f"{store.root}: traces with other {what} ({theirs}) than the indexer's ({own})")


def _turns(rope: Rope | None) -> Rope | None:
    """How it turns, wherever it ends: a converted indexer may end before the backbone."""
    return rope and rope.model_copy(update={"positions": 1})


def open_traces(
    path: Path, indexers: Iterable[MemoryIndexer], partial: bool = False, shard: Shard | None = ALL
) -> TraceStore:
    """A trace store that these indexers can read, every byte of the shard's documents checked.

    partial: even one that lacks documents; shard: None where others check each document before they measure it.
    """
    store = TraceStore.open(path, partial)
    for indexer in indexers:
        check_traces(indexer, store)
    if shard is not None:
        check_store(store.shard(shard))
    return store
