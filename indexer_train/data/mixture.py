"""Several trace stores read as one."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_gen.core.errors import InputError
from data_gen.traces.store import MANIFEST, TraceStore, read_manifest
from indexer_train.spec import Source


def mix(roots: Iterable[Path], partial: bool = False) -> TraceStore:
    """The documents of all stores, in order, under the first one's manifest.

    partial: even of stores that lack documents. Negatives and the documents held back for validation depend on that
    order. Raises InputError unless all are different stores of training documents, traced from one backbone with one
    set of trace settings.
    """
    stores = [TraceStore.open(root, partial) for root in roots]
    seen: set[Path] = set()
    for store in stores:
        store.check_training()
        if (folder := store.root.resolve()) in seen:
            raise InputError(f"{store.root}: given twice; its documents would be used both to train and to validate")
        seen.add(folder)
    first = stores[0].manifest
    for store in stores[1:]:
        for field, own, other in (
            ("backbone", first.backbone.fingerprint, store.manifest.backbone.fingerprint),
            ("trace settings", first.trace, store.manifest.trace),
        ):
            if own != other:
                raise InputError(
                    f"{store.root}: its {field} differs from that of {stores[0].root}; they cannot be mixed"
                )
    return TraceStore(stores[0].root, first, {path: each for store in stores for path, each in store.files.items()})


def sources(store: TraceStore, weights: dict[Path, float] | None) -> list[Source]:
    """The stores that the documents of `store` lie in. weights: how often an epoch reads them, by folder; else once."""
    found = Counter(path.parents[1] for path in store.paths())
    return [
        Source(
            documents=read_manifest(root / MANIFEST).documents,
            training=count,
            weight=(weights or {}).get(root, 1),
        )
        for root, count in found.items()
    ]
