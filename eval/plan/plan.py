"""Bytes and operations of a model with full attention and under LSA: one row of figures for each context.

Counted in operations: matrix products, two per multiply-add, and the weighted sum of an indexer's heads. Not counted:
norms, rotations, softmax, gates, selection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Self

from pydantic import Field, NonNegativeFloat, PositiveInt

from data_gen.config import TraceConfig
from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from eval.plan.load import load_model
from eval.plan.shapes import Cache, Model
from indexer_train.config import IndexerConfig

GIGA = 1e9
CONTEXTS = tuple(2**power for power in range(15, 21))
"""32K to 1M tokens."""
GIB, MIB = 2**30, 2**20
INDEXER_WEIGHT_BYTES = 2
"""The memory indexer's weights are served in bf16."""
PAPER_READERS = {"full": ("CSA scoring", "CSA attention"), "lsa": ("CSA scoring", "memory indexer scoring")}
"""Beside the work that no context changes, what the paper's two columns hold: they do not count the same terms, and
neither counts HCA or window attention. It does not say so; of all choices of terms these come closest to its figures
(arXiv 2606.09079)."""


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


@dataclass(frozen=True)
class HistoryShare:
    """How much of one request's history is resident: `resident` of `chunks` chunks of `chunk_tokens` tokens."""

    context: int
    chunk_tokens: int
    chunks: int
    resident: int

    @classmethod
    def at(cls, model: Model, settings: PlanSettings, context: int) -> "HistoryShare":
        """At least one chunk is resident where there is any."""
        chunks = context // model.chunk_tokens
        return cls(context, model.chunk_tokens, chunks, min(chunks, max(1, int(settings.kept * chunks))))

    def entries(self, cache: Cache) -> int:
        """Entries of `cache` in one layer that stay on the GPU; those after the newest complete chunk always do."""
        everything = cache.entries(self.context)
        if not cache.paged:
            return everything
        return everything - (self.chunks - self.resident) * self.chunk_tokens // cache.tokens


def cache_bytes(model: Model, settings: PlanSettings, residency: HistoryShare) -> dict[str, tuple[int, int]]:
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


@dataclass(frozen=True)
class Work:
    """Operations of one term; paper_full, paper_lsa: whether the paper's columns hold it."""

    term: str
    full: float
    lsa: float
    paper_full: bool
    paper_lsa: bool


def work(model: Model, settings: PlanSettings, residency: HistoryShare) -> list[Work]:
    """All terms of one decoded token after a context. A refresh's work is spread over its window."""
    fixed = dict(model.extra_flops)
    for weight in model.weights:
        fixed[weight.term] = fixed.get(weight.term, 0) + 2 * weight.used
    found = [Work(term, flops, flops, True, True) for term, flops in fixed.items() if flops]
    for cache in model.caches:
        each = cache.layers * cache.read_flops
        full = each * cache.read(cache.entries(residency.context))
        found.append(_read(cache.reader, full, each * cache.read(residency.entries(cache))))
    refresh = settings.indexer_layers / settings.window
    per_chunk = settings.heads * (2 * model.key_width + 2)
    found.append(_read("memory indexer scoring", 0, refresh * residency.chunks * per_chunk))
    found.append(_read("memory indexer projections", 0, refresh * 2 * indexer_weights(model, settings)))
    return found


def _read(term: str, full: float, lsa: float) -> Work:
    return Work(term, full, lsa, term in PAPER_READERS["full"], term in PAPER_READERS["lsa"])


def has_paper_scope(model: Model) -> bool:
    """Whether the model has the layers that the paper counts."""
    return any(cache.reader == "CSA scoring" for cache in model.caches)


@dataclass(frozen=True)
class CapacityPlan:
    """Figures of one model under one set of settings, a row of `plan_row` for each context."""

    model: Model
    settings: PlanSettings
    rows: list[dict[str, Any]]


def make_plan(name: str, contexts: Sequence[int] = CONTEXTS, settings: PlanSettings | None = None) -> CapacityPlan:
    """Plan a model by shipped name, folder or config.json. Raises InputError on a bad one, or a context below 1."""
    settings = settings or PlanSettings()
    if settings.gpu_memory is not None and not isfinite(settings.gpu_memory):
        raise InputError(f"plan {name}: GPU memory of {settings.gpu_memory} GiB; give a number")
    model = load_model(name, settings.chunk_tokens)
    if low := [context for context in contexts if context < 1]:
        raise InputError(f"plan {name}: a context of {low[0]} tokens; it needs at least one")
    return CapacityPlan(model, settings, [plan_row(model, settings, context) for context in sorted(set(contexts))])


def plan_row(model: Model, settings: PlanSettings, context: int) -> dict[str, Any]:
    """Everything about one request after `context` tokens.

    `_gb` are GiB and `_mb` MiB (2^30 and 2^20 bytes), `gflop` 1e9 operations per decoded token. `_full` and `_lsa` are
    complete; `_paper` count what the paper's columns count (None on other models). A request needs its cache and
    `state_gb`; `weights_gb_lsa` holds the memory indexer; `fetch_*` is what refreshes move from host to GPU.
    """
    residency = HistoryShare.at(model, settings, context)
    caches, terms = cache_bytes(model, settings, residency), work(model, settings, residency)
    full, lsa = (sum(pair[column] for pair in caches.values()) for column in (0, 1))
    paper, indexer, weights = has_paper_scope(model), indexer_bytes(model, settings), weight_bytes(model)
    fetch = settings.churn * residency.resident * chunk_bytes(model)
    return {
        "model": model.name,
        "context": context,
        "within_model": context <= model.positions,
        "chunks": residency.chunks,
        "resident_chunks": residency.resident,
        "kv_gb_full": full / GIB,
        "kv_gb_lsa": lsa / GIB,
        "kv_bytes_per_token": bytes_per_token(model),
        "state_gb": model.state_bytes / GIB,
        "host_gb": residency.chunks * chunk_bytes(model) / GIB,
        "fetch_mb_per_refresh": fetch / MIB,
        "fetch_mb_per_token": fetch / MIB / settings.window,
        "gflop_full": sum(term.full for term in terms) / GIGA,
        "gflop_lsa": sum(term.lsa for term in terms) / GIGA,
        "gflop_full_paper": sum(term.full for term in terms if term.paper_full) / GIGA if paper else None,
        "gflop_lsa_paper": sum(term.lsa for term in terms if term.paper_lsa) / GIGA if paper else None,
        "weights_gb": weights / GIB,
        "weights_gb_lsa": (weights + settings.gpus * indexer) / GIB,
        "requests_full": requests_that_fit(model, settings, full + model.state_bytes, 0),
        "requests_lsa": requests_that_fit(model, settings, lsa + model.state_bytes, indexer),
        "kv_terms": {name: {"full": a / GIB, "lsa": b / GIB} for name, (a, b) in caches.items()},
        "gflop_terms": {
            term.term: {
                "full": term.full / GIGA,
                "lsa": term.lsa / GIGA,
                "paper_full": paper and term.paper_full,
                "paper_lsa": paper and term.paper_lsa,
            }
            for term in terms
        },
    }
