"""A small DeepSeek-V4 indexer and traces for it."""

import pytest
import torch

from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import encode_keys
from data_gen.core.rope import Rope
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, GoldenChunks, Manifest, RawTrace, Span
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer

POSITIONS, HIDDEN, WIDTH = 600, 24, 128
ROPE = Rope(dims=64, theta=160000, positions=POSITIONS, factor=16)


@pytest.fixture
def make_indexer():
    """A random indexer for DeepSeek-V4 keys; `spec` and `shape` change what it is."""

    def make(layers=(10, 12, 20), shape=None, **spec):
        torch.manual_seed(0)
        plain = {"heads": 3, "rank": 5, "distance_bumps": 0, "scale": False, "slot": False, "join": "max"}
        defaults = {
            "layers": list(layers),
            "hidden": HIDDEN,
            "key_width": WIDTH,
            "chunking": Chunking(tokens=4, sink=0, recent=2),
            "window": 8,
            "backbone": "small-v4",
            "key": "fp8_rope_hadamard",
            "rope": ROPE,
        }
        indexer = MemoryIndexer.from_spec(
            IndexerSpec(shape=IndexerConfig(**plain | (shape or {})), **defaults | spec), device="cpu"
        )
        for parameter in indexer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return indexer.eval()

    return make


@pytest.fixture
def arguments():
    """(hidden, stored keys, positions) for three layers."""
    generator = torch.Generator().manual_seed(1)
    keys = encode_keys(torch.randn(20, 3, WIDTH, generator=generator))
    return torch.randn(4, 3, HIDDEN, generator=generator), keys, torch.tensor([0, 7, 333, POSITIONS - 1])


@pytest.fixture
def v4_store(tmp_path):
    """Traces of random votes on layers 10 and 12."""
    generator = torch.Generator().manual_seed(2)
    layers, tokens, chunks = [10, 12], 40, 60
    trace = TraceConfig(
        chunking=Chunking(tokens=4, sink=0, recent=2), layers=layers, oracle="indexer", window=8, tail=8, text_rows=8
    )
    info = BackboneInfo(
        "deepseek_v4", "small-v4", list(range(21)), HIDDEN, WIDTH, POSITIONS, key="fp8_rope_hadamard", rope=ROPE
    )
    store = TraceStore.create(
        tmp_path / "v4",
        Manifest(backbone=info, trace=trace, documents={}, plan={n: (str(n), "") for n in range(6)}, versions={}),
    )
    for index in range(6):
        votes = torch.randint(0, 5, (tokens, chunks), generator=generator)
        votes[:, 50:] = 0
        raw = RawTrace(
            hidden={layer: torch.randn(tokens, HIDDEN, generator=generator).bfloat16() for layer in layers},
            keys={layer: encode_keys(torch.randn(chunks, WIDTH, generator=generator)) for layer in layers},
            positions=torch.arange(4 * chunks - tokens, 4 * chunks),
            oracle=GoldenChunks.from_votes(votes, 3),
        )
        span = Span(first=0, last=tokens, serve=0, tail=False)
        store.write(index, DocumentMeta(name=str(index), task="chat", length=4 * chunks, spans=[span]), raw)
    return store
