"""What the model's configuration cannot tell: the resident set, the memory indexer, the GPU."""

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveInt

from data_gen.config import TraceConfig
from data_gen.core.config import Strict
from indexer_train.config import IndexerConfig


class PlanSettings(Strict):
    """The defaults are those of the paper's efficiency table (arXiv 2606.09079).

    kept: resident chunks / all chunks, protected ones included (the paper: 6,144 of 65,536); window: tau, decoded
    tokens between two refreshes; churn: share of the resident set that a refresh replaces (measured: 0.25-0.32 at
    10 % kept).
    indexer_layers, heads, rank: shape of the memory indexer; chunk_tokens: tokens in a chunk, None for the model's own
    (one compressed entry on DeepSeek-V4, 16 tokens on a dense model).
    gpu_memory: GiB of one GPU, None to leave out how many requests fit; gpus: how many share the weights.
    """

    kept: float = Field(default=6144 / 65536, ge=0, le=1)
    window: PositiveInt = 64
    churn: float = Field(default=0.3, ge=0, le=1)
    indexer_layers: PositiveInt = 3
    heads: PositiveInt = 128
    rank: PositiveInt = 2048
    chunk_tokens: PositiveInt | None = None
    gpu_memory: NonNegativeFloat | None = None
    gpus: PositiveInt = 1

    @classmethod
    def of(cls, trace: TraceConfig, indexer: IndexerConfig) -> Self:
        """A recipe's window, layers, chunks and indexer in place of the paper's."""
        return cls(
            window=trace.window,
            indexer_layers=len(trace.layers),
            heads=indexer.heads,
            rank=indexer.rank,
            chunk_tokens=trace.chunking.tokens,
        )
