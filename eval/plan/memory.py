"""Bytes: the cache on the GPU, the cold pool on the host, what a refresh fetches, how many requests fit."""

from dataclasses import dataclass

from eval.plan.settings import PlanSettings
from eval.plan.shapes import Cache, Model

GIB, MIB = 2**30, 2**20
INDEXER_WEIGHT_BYTES = 2
"""The memory indexer's weights are served in bf16."""


@dataclass(frozen=True)
class Residency:
    """How much of one request's history is resident: `resident` of `chunks` chunks of `chunk_tokens` tokens."""

    context: int
    chunk_tokens: int
    chunks: int
    resident: int

    @classmethod
    def at(cls, model: Model, settings: PlanSettings, context: int) -> "Residency":
        """At least one chunk is resident where there is any."""
        chunks = context // model.chunk_tokens
        return cls(context, model.chunk_tokens, chunks, min(chunks, max(1, int(settings.kept * chunks))))

    def entries(self, cache: Cache) -> int:
        """Entries of `cache` in one layer that stay on the GPU; those behind the newest complete chunk always do."""
        everything = cache.entries(self.context)
        if not cache.paged:
            return everything
        return everything - (self.chunks - self.resident) * self.chunk_tokens // cache.tokens


def cache_bytes(model: Model, settings: PlanSettings, residency: Residency) -> dict[str, tuple[int, int]]:
    """Bytes of one request's cache on the GPU by kind: name -> (full, LSA). The memory indexer keeps all its keys."""
    terms = {}
    for cache in model.caches:
        each = cache.layers * cache.entry_bytes
        terms[cache.name] = (cache.entries(residency.context) * each, residency.entries(cache) * each)
    terms["memory indexer keys"] = (0, settings.indexer_layers * residency.chunks * model.key_bytes)
    return terms


def bytes_per_token(model: Model) -> float:
    """Bytes that one more token of context adds to a full cache, on average."""
    return sum(cache.layers * cache.entry_bytes / cache.tokens for cache in model.caches if cache.window is None)


def chunk_bytes(model: Model) -> int:
    """Bytes of one chunk over all layers: what the cold pool holds and a fetch moves."""
    return sum(
        cache.layers * cache.entry_bytes * model.chunk_tokens // cache.tokens for cache in model.caches if cache.paged
    )


def weight_bytes(model: Model) -> int:
    """Bytes of the model's own weights."""
    return sum(weight.stored for weight in model.weights)


def indexer_bytes(model: Model, settings: PlanSettings) -> int:
    """Bytes of the memory indexer's weights."""
    return settings.indexer_layers * INDEXER_WEIGHT_BYTES * indexer_weights(model, settings)


def indexer_weights(model: Model, settings: PlanSettings) -> int:
    """Weights of one memory indexer layer: W_a, W_b and W_w."""
    down, up = model.hidden * settings.rank, settings.rank * settings.heads * model.key_width
    return down + up + model.hidden * settings.heads


def requests_that_fit(model: Model, settings: PlanSettings, request: int, replicated: int) -> int | None:
    """Requests of `request` bytes beside the weights; None when no GPU memory is given.

    The weights are spread evenly over the GPUs, `replicated` bytes are on each, and a request lives on one GPU.
    Activations and the engine's workspace are not counted: give less memory for them.
    """
    if settings.gpu_memory is None:
        return None
    free = int(settings.gpu_memory * GIB) - -(-weight_bytes(model) // settings.gpus) - replicated
    return settings.gpus * max(0, free // request)
