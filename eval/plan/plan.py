"""A capacity plan: one row of figures for each context."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from data_gen.core.errors import InputError
from eval.plan.compute import has_paper_scope, work
from eval.plan.load import load_model
from eval.plan.memory import (
    GIB,
    MIB,
    Residency,
    bytes_per_token,
    cache_bytes,
    chunk_bytes,
    indexer_bytes,
    requests_that_fit,
    weight_bytes,
)
from eval.plan.settings import PlanSettings
from eval.plan.shapes import Model

GIGA = 1e9
CONTEXTS = tuple(2**power for power in range(15, 21))
"""32K to 1M tokens."""


@dataclass(frozen=True)
class Plan:
    """Figures of one model under one set of settings, a row of `plan_row` for each context."""

    model: Model
    settings: PlanSettings
    rows: list[dict[str, Any]]


def make_plan(name: str, contexts: Sequence[int] = CONTEXTS, settings: PlanSettings | None = None) -> Plan:
    """Plan a model by shipped name, folder or config.json. Raises InputError on a bad one, or a context below 1."""
    settings = settings or PlanSettings()
    if settings.gpu_memory is not None and not isfinite(settings.gpu_memory):
        raise InputError(f"plan {name}: GPU memory of {settings.gpu_memory} GiB; give a number")
    model = load_model(name, settings.chunk_tokens)
    if low := [context for context in contexts if context < 1]:
        raise InputError(f"plan {name}: a context of {low[0]} tokens; it needs at least one")
    return Plan(model, settings, [plan_row(model, settings, context) for context in sorted(set(contexts))])


def plan_row(model: Model, settings: PlanSettings, context: int) -> dict[str, Any]:
    """Everything about one request behind `context` tokens.

    `_gb` are GiB and `_mb` MiB (2^30 and 2^20 bytes), `gflop` 1e9 operations per decoded token. `_full` and `_lsa` are
    complete; `_paper` count what the paper's columns count (None on other models). A request needs its cache and
    `state_gb`; `weights_gb_lsa` holds the memory indexer; `fetch_*` is what refreshes move from host to GPU.
    """
    residency = Residency.at(model, settings, context)
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
