"""An indexer for any model, untrained: what it chooses is arbitrary, and the same on every call."""

import torch

from data_gen.backbones.load import adapter
from data_gen.core.chunks import Chunking
from indexer_train.config import IndexerConfig
from indexer_train.model import MemoryIndexer
from indexer_train.spec import IndexerSpec


def untrained(model):
    """Windows of 8 tokens, chunks of 4; it reads the first two full-attention layers, and lies where the model does."""
    info = adapter(model).info
    torch.manual_seed(3)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=4, rank=8, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=info.full_layers[:2], hidden=info.hidden, key_width=info.key_width, window=8, key=info.key,
        chunking=Chunking(tokens=4, sink=1, recent=2), backbone=info.fingerprint, rope=info.rope,
    )  # fmt: skip
    return MemoryIndexer.from_spec(spec, device=str(model.device)).eval()
