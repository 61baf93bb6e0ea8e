"""Ways to rank chunks: the indexer, the oracle, and what needs no training. All get the same protected chunks."""

import hashlib
from collections.abc import Callable

import torch

from data_gen.store import TraceDocument
from indexer_train.metrics import ServedWindows, indexer_scores
from indexer_train.model import MemoryIndexer

Policy = Callable[[ServedWindows], torch.Tensor]
"""The windows of one document -> [W, N] scores; the highest are kept."""


def oracle(served: ServedWindows) -> torch.Tensor:
    """The attention mass itself: the best possible mass recall at any budget (golden recall has `golden_oracle`)."""
    return served.labels.mass


def golden_oracle(served: ServedWindows) -> torch.Tensor:
    """The peaks themselves: the best possible golden recall at any budget."""
    return served.labels.peak


def mean_pooled(served: ServedWindows) -> torch.Tensor:
    """Mean-pooled keys scored by the backbone's own queries at the window's start, without lookahead."""
    return served.document.mean_pooled[served.windows[:, 0]].float()


def recency(served: ServedWindows) -> torch.Tensor:
    """Newest first."""
    return torch.arange(served.document.chunks).float().expand(len(served.windows), -1)


def random(served: ServedWindows) -> torch.Tensor:
    """Uniform, the same on every run for a document of the same name."""
    digest = hashlib.sha256(served.document.meta.name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return torch.rand(len(served.windows), served.document.chunks, generator=generator)


def policies(indexer: MemoryIndexer, document: TraceDocument) -> dict[str, Policy]:
    """All policies that `document` allows, by name, in the order of the tables."""
    found = {
        "oracle": oracle,
        "indexer": lambda served: indexer_scores(indexer, served),
        "mean_pooled": mean_pooled,
        "recency": recency,
        "random": random,
    }
    if document.mean_pooled is None:  # DeepSeek-V4: its keys are learned, nothing is pooled
        del found["mean_pooled"]
    return found
