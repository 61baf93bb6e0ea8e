"""Indexers for the evaluation's tests, one that knows nothing and one that knows the planted secret; a fault."""

import pytest
import torch

from data_gen.core.chunks import Chunking
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer


@pytest.fixture(scope="session")
def indexer(stores):
    """Random weights for the tiny Llama's traces."""
    return _random_indexer(stores[1].manifest, seed=0)


@pytest.fixture(scope="session")
def other(stores):
    """Other random weights."""
    return _random_indexer(stores[1].manifest, seed=1)


def _random_indexer(manifest, seed):
    torch.manual_seed(seed)
    return MemoryIndexer.from_spec(
        IndexerSpec(
            shape=IndexerConfig(heads=4, rank=8),
            layers=manifest.trace.layers,
            hidden=manifest.backbone.hidden,
            key_width=manifest.backbone.key_width,
            chunking=manifest.trace.chunking,
            window=manifest.trace.window,
            backbone=manifest.backbone.fingerprint,
        ),
        device="cpu",
    )


def planted_indexer():
    """An indexer set by hand to undo the rotation of `planted_store`: it names both chunks of every window."""
    width = 32
    rotation = torch.linalg.qr(torch.randn(2, 2 * width, 2 * width, generator=torch.Generator().manual_seed(99))).Q
    indexer = MemoryIndexer.from_spec(
        IndexerSpec(
            shape=IndexerConfig(heads=2, rank=2 * width, distance_bumps=0, scale=False, slot=False),
            layers=[0, 1],
            hidden=2 * width,
            key_width=width,
            chunking=Chunking(tokens=4, sink=1, recent=2),
            window=2,
            backbone="planted",
        ),
        device="cpu",
    )
    for turn, encoder in zip(rotation, indexer.query_encoder.encoders.values(), strict=True):
        encoder.wq_a.weight.data = turn  # hidden = (both keys) turn
        encoder.wq_b.weight.data = torch.eye(2 * width)
        encoder.weights_proj.weight.data = turn.sum(dim=0).repeat(2, 1)  # keys hold a 4 and zeros: the sum is positive
    return indexer


@pytest.fixture
def cannot_pin(monkeypatch):
    """A machine, with a GPU or without, that has no more memory to pin."""
    plain = torch.empty

    def empty(*sizes, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory\nand more lines")
        return plain(*sizes, **options)

    monkeypatch.setattr(torch, "empty", empty)
