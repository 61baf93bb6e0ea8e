"""Several trace stores read as one."""

from collections.abc import Iterable
from pathlib import Path

from data_gen.errors import InputError
from data_gen.store import TraceStore


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
