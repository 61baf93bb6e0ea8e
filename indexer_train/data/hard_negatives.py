"""Hard negatives: chunks that an indexer ranks high and the oracle does not need, mined with faiss.

STORE/hard_negatives/0000/doc_0000000.safetensors   chunks [T, count] int32, hardest first, -1 after the last;
                                                    metadata: made_by (indexer, golden, count), document
"""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import safe_open

from data_gen.core.errors import InputError
from data_gen.core.files import broken_seal, save_tensors, sweep, whole, write_atomically
from data_gen.core.keys import key_vectors
from data_gen.core.tell import Progress
from data_gen.traces.store import TraceDocument, TraceStore
from indexer_train.data.sampling import as_tensor, without
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import join_layers

FOLDER = "hard_negatives"
OVERSAMPLE = 4
"""Chunks looked up on the surrogate for each one kept: dropping the ReLU reorders the top."""
ROWS = 64
"""Query tokens scored at once."""


class HardNegatives:
    """The sidecar of a trace store, as training reads it: a document's when its turn comes.

    made_by: what the documents' chunks were mined by.
    """

    def __init__(self, made_by: list[str]) -> None:
        self.made_by = made_by

    @classmethod
    def beside(cls, store: TraceStore) -> Self:
        """What was mined for the store's documents. Raises InputError when one is missing, damaged or of another."""
        return cls(sorted({_read(document)[1] for document in store}))

    def of(self, document: TraceDocument, rows: torch.Tensor) -> list[np.ndarray]:
        """Chunks mined for each of the rows ([B]), hardest first. Raises InputError when they are others by now."""
        chunks, maker = _read(document)
        if maker not in self.made_by:
            raise InputError(f"{_sidecar(document)}: mined anew since training began; begin it again")
        return [row[row >= 0] for row in chunks[rows].long().numpy()]


def mine(
    indexer: MemoryIndexer,
    store: TraceStore,
    golden: float,
    count: int,
    progress: Progress,
) -> None:
    """Write the `count` hardest negatives of every query token beside the store; whole sidecars of these are kept.

    golden: peak (or votes) that makes a chunk golden. Golden and protected chunks are never among them. Raises
    InputError without faiss.
    """
    _faiss()
    made_by = json.dumps({"indexer": indexer.digest(), "golden": golden, "count": count})
    for folder in (store.root / FOLDER).glob("*/"):
        sweep(folder)
    for document in progress(store, "mining"):
        with suppress(InputError):
            if _read(document)[1] == made_by:
                continue
        sidecar = _sidecar(document)
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        mined = {"chunks": mine_document(indexer, document, golden, count)}
        metadata = {"made_by": made_by, "document": document.checksum or ""}
        write_atomically(sidecar, partial(save_tensors, mined, metadata=metadata))


@torch.no_grad()
def mine_document(indexer: MemoryIndexer, document: TraceDocument, golden: float, count: int) -> torch.Tensor:
    """[T, count] int32, see the module; rows that start no window have none, and no row more than there are chunks."""
    count = min(count, document.chunks)
    found = torch.full((len(document.positions), count), -1, dtype=torch.int32)
    windows = document.windows(serving=False)
    if not len(windows):
        return found
    indexer.eval()
    spec, oracle = indexer.spec, document.oracle
    keys = key_vectors(torch.stack([document.keys(layer) for layer in spec.layers], dim=1)).flatten(1)
    index = _faiss().IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    keys = keys.to(indexer.device)
    states = [document.hidden(layer) for layer in spec.layers]
    for some in windows.split(ROWS):
        rows = some[:, 0]
        hidden, positions = torch.stack([state[rows] for state in states], dim=1), document.positions[rows]
        queries = indexer.pack(hidden, positions)
        limits = [document.trace.chunking.candidates(int(position)) for position in positions]
        needed = [
            oracle.window(first, last, bounds).golden(golden)
            for (first, last), bounds in zip(some.tolist(), limits, strict=True)
        ]
        excluded = max(
            len(gold) + len(keys) - (last - first) for gold, (first, last) in zip(needed, limits, strict=True)
        )
        wanted = min(len(keys), OVERSAMPLE * count + excluded)
        near = index.search(indexer.surrogate(queries).cpu().numpy(), wanted)[1]
        pools = [
            without(chunks[(chunks >= first) & (chunks < last)], gold)[: OVERSAMPLE * count]
            for chunks, gold, (first, last) in zip(near, needed, limits, strict=True)
        ]
        candidates = as_tensor(pools)
        missing = torch.arange(candidates.shape[1]) >= torch.tensor([len(pool) for pool in pools])[:, None]
        logits = indexer.layer_logits(queries, keys, candidates=candidates.to(indexer.device))
        scores = join_layers(logits, spec.shape.join).cpu().masked_fill(missing, -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        chunks = candidates.masked_fill(missing, -1).gather(1, order)
        found[rows, : chunks.shape[1]] = chunks.int()
    return found


def _sidecar(document: TraceDocument) -> Path:
    return document.root / FOLDER / document.path.relative_to(document.root)


def _read(document: TraceDocument) -> tuple[torch.Tensor, str]:
    """(chunks [T, count], what they were made by) beside `document`, every byte checked."""
    sidecar = _sidecar(document)
    if not sidecar.exists():
        raise InputError(f"{sidecar}: no hard negatives there; run `lookahead mine` on these traces first")
    rows, visible = len(document.positions), document.chunks
    with whole(sidecar, "hard negatives", "mine again"), safe_open(sidecar, framework="pt") as file:
        if reason := broken_seal(sidecar):
            raise ValueError(reason)
        chunks, made_by = file.get_tensor("chunks"), file.metadata()["made_by"]
        if file.metadata()["document"] != document.checksum:
            raise ValueError("of another document")
        if chunks.dtype != torch.int32 or chunks.ndim != 2 or len(chunks) != rows:
            raise ValueError(f"chunks are {chunks.dtype} {list(chunks.shape)} beside {rows} rows")
        if chunks.numel() and not -1 <= int(chunks.min()) <= int(chunks.max()) < visible:
            raise ValueError(f"it names chunks {int(chunks.min())} to {int(chunks.max())} of {visible}")
    return chunks, made_by


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "mining needs faiss, which is not installed: pip install 'lookahead-indexer[cpu]', "
            "or [gpu] on a machine with CUDA"
        ) from error
    return faiss
