"""The attention side of a dense model's decode step, as attention_side.py has that of DeepSeek-V4."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_side import Side, Work, fastest, fetching, refreshed, small_bytes
from data_gen.core.chunks import Chunking
from eval.serving.level1 import open_level1
from eval.serving.pools import HotPool
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Budget

STAGED = 256
"""Chunks that come to the device at once, before each layer takes its part."""


@dataclass(frozen=True)
class DenseShape:
    """Sizes of a dense model. width: of a head; tokens: of a chunk; indexer: heads and rank of the memory indexer."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    hidden: int
    tokens: int = 16
    indexer: tuple[int, int] = (16, 128)


def dense(
    shape: DenseShape, context: int, batch: int, resident: int | None, churn: float, device: torch.device
) -> Side:
    """PyTorch's own attention over all keys and values, or over those of the resident chunks."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chunks = context // shape.tokens if resident is None else resident
    size = (shape.layers, 2, batch, shape.kv_heads, chunks * shape.tokens, shape.width)
    cache = torch.empty(size, dtype=dtype, device=device)
    small_bytes(cache.view(torch.uint8))
    # the heads that share keys are rows of one product
    query = torch.randn(batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.width, dtype=dtype, device=device)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]
    attend = fastest([partial(_attention, backend, query) for backend in backends], device, *cache[0])

    def step() -> list[torch.Tensor]:
        return [attend(keys, values) for keys, values in cache]

    if resident is None:
        return Side(step, {"attention": step}, None, None, cache.nbytes, 0)
    refresh, keys = _dense_refresh(shape, context, batch, resident, device)
    count = batch * int(churn * resident)
    fetch = _dense_fetch(shape, cache, count)
    fetched = count * cache[:, :, 0, :, : shape.tokens].nbytes
    return Side(step, {"attention": step}, refresh, fetch, cache.nbytes + keys, fetched)


def _attention(backend: SDPBackend, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, keys, values)


def _dense_refresh(
    shape: DenseShape, context: int, batch: int, resident: int, device: torch.device
) -> tuple[Work, int]:
    """Level 1 of a dense model, and the bytes of its keys: attention keys averaged over chunks."""
    heads, rank = shape.indexer
    width, chunks, layers = shape.kv_heads * shape.width, context // shape.tokens, 3
    spec = IndexerSpec(
        shape=IndexerConfig(heads=heads, rank=rank),
        layers=list(range(layers)),
        hidden=shape.hidden,
        key_width=width,
        chunking=Chunking(tokens=shape.tokens, sink=1, recent=1),
        window=64,
        backbone="none: random weights",
        key="mean_pre_rope",
    )
    indexer = MemoryIndexer.from_spec(spec, device=str(device)).eval()
    level1 = open_level1(indexer, Limits(cap=resident), Budget(budget=resident / chunks), backend="torch")
    keys = torch.randn(batch, chunks, layers, width, device=device, dtype=torch.float16)
    hidden = torch.randn(batch, layers, shape.hidden, device=device)
    positions = torch.full((batch,), context - 1, device=device)
    return partial(refreshed, level1, hidden, positions, keys), keys.nbytes


def _dense_fetch(shape: DenseShape, cache: torch.Tensor, count: int) -> Work:
    """`count` chunks of random sequences: all layers in one copy, then each layer's part to its place."""
    layers, _, batch, kv_heads, tokens, width = cache.shape
    places = cache.unflatten(4, (tokens // shape.tokens, shape.tokens))
    staged = HotPool(min(count, STAGED), (layers * 2 * kv_heads * shape.tokens * width * cache.itemsize,),
                     torch.uint8, cache.device)  # fmt: skip
    bring, _ = fetching(staged, staged.capacity)
    units = staged.slots.view(cache.dtype).view(-1, layers, 2, kv_heads, shape.tokens, width)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(batch * places.shape[4], generator=generator)[:count].to(cache.device)

    def fetch() -> None:
        for some in order.split(len(units)):
            bring()
            places[:, :, some // places.shape[4], :, some % places.shape[4]] = units[: len(some)]

    return fetch
