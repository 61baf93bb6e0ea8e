"""Floating-point operations of one decoded token, term by term, with full attention and under LSA.

Counted: matrix products, two operations per multiply-add, and the weighted sum of an indexer's heads. Not counted:
norms, rotations, softmax, gates, selection.
"""

from dataclasses import dataclass

from eval.plan.memory import Residency, indexer_weights
from eval.plan.settings import PlanSettings
from eval.plan.shapes import Model

PAPER_READERS = {"full": ("CSA scoring", "CSA attention"), "lsa": ("CSA scoring", "memory indexer scoring")}
"""Beside the work that no context changes, what the paper's two columns hold: they do not count the same terms, and
neither counts HCA or window attention. It does not say so; of all choices of terms these come closest to its figures
(arXiv 2606.09079)."""


@dataclass(frozen=True)
class Work:
    """Operations of one term; paper_full, paper_lsa: whether the paper's columns hold it."""

    term: str
    full: float
    lsa: float
    paper_full: bool
    paper_lsa: bool


def work(model: Model, settings: PlanSettings, residency: Residency) -> list[Work]:
    """All terms of one decoded token behind a context. A refresh's work is spread over its window."""
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
