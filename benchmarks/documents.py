"""The documents that training and evaluation are measured on: dumps in the release's format, and a trace store."""

import pickle
from pathlib import Path

import torch

from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import encode_keys
from data_gen.flashmemory.folder import import_dumps

LAYERS = [10, 12, 20]
HIDDEN, TOKENS, WINDOW, GOLDEN = 4096, 512, 64, 3


def write_dumps(folder: Path, documents: int, chunks: int) -> None:
    """Dumps in the release's format. A token needs 8 to 32 chunks of a pool that drifts as the document goes on.

    The width of the pool differs between documents (lognormal), so that batches hold samples of different sizes.
    """
    for number in range(documents):
        rng = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in LAYERS:
            tensors[f"hidden_layer_{layer}"] = torch.randn(TOKENS, HIDDEN, generator=rng).bfloat16()
            tensors[f"compk_layer_{layer}"] = encode_keys(torch.randn(chunks, 128, generator=rng))
            tensors[f"positions_layer_{layer}"] = torch.arange(4 * chunks - TOKENS, 4 * chunks)
        pool = int(84 * torch.randn(1, generator=rng).mul(0.5).exp())
        order = torch.randperm(chunks - TOKENS // 4, generator=rng)
        needed = [
            order[token // 8 : token // 8 + pool][torch.rand(pool, generator=rng) < 0.25].sort().values
            for token in range(TOKENS)
        ]
        tensors["label_indices"] = torch.cat(needed).int()
        tensors["label_scores"] = torch.full_like(tensors["label_indices"], GOLDEN)
        counts = torch.tensor([len(chunks) for chunks in needed])
        tensors["label_pointers"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        (folder / f"doc_{number:05d}.pkl").write_bytes(pickle.dumps(tensors, protocol=4))


def write_store(folder: Path, documents: int, chunks: int) -> Path:
    """Dumps in `folder`, and the same documents as a trace store."""
    folder.mkdir()
    write_dumps(folder, documents, chunks)
    chunking = Chunking(tokens=4, sink=0, recent=0)
    trace = TraceConfig(chunking=chunking, layers=LAYERS, oracle="indexer", window=WINDOW)
    import_dumps(folder, folder / "store", trace, lambda items, _: items)
    return folder
