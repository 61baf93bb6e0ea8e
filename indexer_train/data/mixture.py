"""Several trace stores read as one."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_gen.core.errors import InputError
from data_gen.traces.store import TraceStore
from indexer_train.spec import Source


def mix(roots: Iterable[Path]) -> TraceStore:
    """The documents of all stores, in order, under the first one's manifest.

    Negatives and the documents held back for validation depend on that order. Raises InputError unless all are
    different stores of training documents, traced from one backbone with one set of trace settings.
    """
    stores = [TraceStore.open(root) for root in roots]
    seen: set[Path] = set()
    for store in stores:
        store.check_training()
        if (folder := store.root.resolve()) in seen:
            raise InputError(f"{store.root}: given twice; its documents would be trained and validated on alike")
        seen.add(folder)
    first = stores[0].manifest
    for store in stores[1:]:
        for field, own, other in (
            ("backbone", first.backbone.fingerprint, store.manifest.backbone.fingerprint),
            ("trace settings", first.trace, store.manifest.trace),
        ):
            if own != other:
                raise InputError(f"{store.root}: another {field} than {stores[0].root}; they cannot be mixed")
    return TraceStore(stores[0].root, first, [path for store in stores for path in store.paths()])


def sources(store: TraceStore, weights: dict[Path, float] | None) -> list[Source]:
    """The stores that the documents of `store` lie in. weights: how often an epoch reads them, by folder; else once."""
    found = Counter(path.parent for path in store.paths())
    return [
        Source(documents=TraceStore.open(root).manifest.documents, training=count, weight=(weights or {}).get(root, 1))
        for root, count in found.items()
    ]
