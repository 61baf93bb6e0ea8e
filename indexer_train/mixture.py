"""Several trace stores read as one."""

from collections.abc import Iterable
from pathlib import Path

from data_gen.errors import InputError
from data_gen.store import TraceStore


def mix(roots: Iterable[Path]) -> TraceStore:
    """The documents of all stores, in order, under the first one's manifest.

    Raises InputError unless all were traced from one backbone with one set of trace settings.
    """
    stores = [TraceStore.open(root) for root in roots]
    first = stores[0].manifest
    for store in stores[1:]:
        for field, own, other in (
            ("backbone", first.backbone.fingerprint, store.manifest.backbone.fingerprint),
            ("trace settings", first.trace, store.manifest.trace),
        ):
            if own != other:
                raise InputError(f"{store.root}: another {field} than {stores[0].root}; they cannot be mixed")
    return TraceStore(stores[0].root, first, [path for store in stores for path in store.paths()])
