"""Ways to fix the resident set while a model decodes, beside full attention.

A policy is an entry of `ONLINE_POLICIES`. Most score the complete chunks of a session, [N], from what it has read so
far, and keep the best under a budget; only the oracle knows what follows. Policies over traces are elsewhere
(eval/offline).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from data_gen.backbones.dense import content_keys
from data_gen.core.keys import mean_pooled_scores
from data_gen.core.tensors import tiled_scores
from eval.online.cycle import Keep
from eval.online.session import CsaSession, DenseSession, DsaSession, Session
from eval.runtime.correction import Correction
from eval.runtime.cycle import Choice
from eval.serving.select import Fallback, Limits, resident_chunks, serve
from indexer_train.config import Rule
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Selection

Ranking = Callable[[Session], torch.Tensor]
"""A session -> scores [N] of its complete chunks, on the CPU."""


def indexer_policy(indexer: MemoryIndexer) -> Ranking:
    """The trained indexer at the newest token."""

    def score(session: Session) -> torch.Tensor:
        hidden, keys = session.asked(indexer.spec.layers)
        return indexer.joined_scores(hidden, keys, torch.tensor([session.position]))[0].cpu()

    return score


def mean_pooled(session: Session) -> torch.Tensor:
    """The backbone's own query at the newest token against mean-pooled keys, averaged over layers: [N]."""
    assert isinstance(session, DenseSession)
    scores = []
    for layer, call in session.newest.items():
        pooled = session.cache.pooled[layer].pooled[0]
        visible = torch.tensor([pooled.shape[1]], device=pooled.device)
        query = call.content().query
        assert query is not None
        scores.append(mean_pooled_scores(query[0, :, -1:], content_keys(call.module, pooled), call.scaling, visible)[0])
    return torch.stack(scores).mean(dim=0).cpu()


def native(session: Session) -> torch.Tensor:
    """The backbone's own indexers at the newest token: softmax over what they score, averaged over their layers,
    [N].

    They score a chunk of a DeepSeek-V4 as a whole, and with DSA each of its tokens, whose shares add up.
    """
    assert isinstance(session, CsaSession | DsaSession)
    scores = []
    entries = session.cache.index_entries(0).unbind(dim=1)
    for (query, weights), keys in zip(session.native.values(), entries, strict=True):
        chunks, keys = keys.shape[:2], keys.flatten(0, 1).to(query.device, torch.float32)
        shares = tiled_scores(query.float(), weights, keys)[0].softmax(dim=-1)
        scores.append(shares.view(chunks).sum(dim=1).cpu())
    return torch.stack(scores).mean(dim=0)


def recency(session: Session) -> torch.Tensor:
    """Newest first: [N]."""
    return torch.arange(session.chunking.visible(session.position)).float()


def random(session: Session) -> torch.Tensor:
    """Uniform, a function of the position alone: [N]."""
    generator = torch.Generator().manual_seed(session.position)
    return torch.rand(session.chunking.visible(session.position), generator=generator)


def protected(session: Session) -> torch.Tensor:
    """Nothing beside the sink and the newest chunks, whatever the budget: [N] of -inf."""
    return torch.full((session.chunking.visible(session.position),), -torch.inf)


class Foresight:
    """The oracle: what the answer given with full attention went on to attend to.

    `watch` is called after every token that the full course reads. As a policy, the score of a chunk at a refresh is
    the attention mass on it of the `window` tokens that the full course read next, averaged over them, heads and
    full-attention layers, as in the traces. For text that is the future itself: every policy reads the same tokens.
    For answers it is the future as long as they agree with full attention's; after that, and beyond the end of the
    full answer (whose last token then stands for the rest), it is what the full course needed.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._masses: dict[int, torch.Tensor] = {}

    def watch(self, session: Session, logits: torch.Tensor | None = None) -> None:
        """Keep the newest token's attention mass on each complete chunk, [N]. Everything must be resident."""
        self._masses[session.position] = session.mass()

    def __call__(self, session: Session) -> torch.Tensor:
        """Scores [N] of the complete chunks for the window after the newest token."""
        last = max(self._masses)
        first = min(session.position + 1, last)
        window = [self._masses[place] for place in range(first, min(first + self.window, last + 1))]
        visible = session.chunking.visible(session.position)
        scores = torch.zeros(visible)
        for mass in window:
            scores[: len(mass)] += mass[:visible]
        return scores / len(window)


@dataclass(frozen=True)
class Capped:
    """The indexer as it is served: the chunks that its rule asks for, under a cap, with demand fallback above it.

    share: of the chunks that may be resident beside the protected ones; fallback: when a window gets full attention,
    None for never.
    """

    indexer: MemoryIndexer
    rule: Selection
    share: float
    fallback: Fallback | None

    def __call__(self, session: Session) -> Choice:
        """What should be resident in the session."""
        position, chunking = session.position, session.chunking
        total, (first, last) = chunking.visible(position), chunking.candidates(position)
        cap = chunking.kept(self.share, position) + chunking.sink + chunking.recent
        scores, positions = indexer_policy(self.indexer)(session)[None], torch.tensor([position])
        resident = resident_chunks(scores, positions, chunking, self.rule, Limits(cap=cap))
        chunks, how = serve(resident, 0, total, cap, total - (last - first), self.fallback)
        return Choice([chunks], resident.demand.tolist(), [how])


def calibrated(indexer: MemoryIndexer, by: Rule) -> Selection | None:
    """The first rule of a kind that the bundle carries."""
    return next((each for each in indexer.spec.selections if each.by == by), None)


@dataclass(frozen=True)
class Circumstances:
    """What a policy is made of for one example. share: of the unprotected chunks that it may keep; correction: of those
    that correct every step."""

    indexer: MemoryIndexer
    foresight: Foresight
    share: float
    correction: Correction | None = None


def best(score: Ranking, share: float) -> Keep:
    """Keeps the best chunks by `score`, as many as `share` of the unprotected ones."""
    return lambda session: session.best(score(session), share)


@dataclass(frozen=True)
class OnlinePolicy:
    """A way to fix the resident set.

    name: in recipes, rows and records; keep: makes what fixes it, for one example; under: what is asked of it: every
    one of the budgets, the cap alone, or nothing; foresees: it looks at what full attention went on to need; corrects:
    it is asked with a correction only; has: whether an indexer and its backbone allow it.
    """

    name: str
    keep: Callable[[Circumstances], Keep]
    under: Literal["budgets", "nothing", "cap"] = "budgets"
    foresees: bool = False
    corrects: bool = False
    has: Callable[[MemoryIndexer], bool] = lambda indexer: True


def _capped(name: str, by: Rule) -> OnlinePolicy:
    """The bundle's rule of a kind under the cap, where it carries one."""

    def keep(given: Circumstances) -> Keep:
        rule = calibrated(given.indexer, by)
        assert rule is not None  # or the policy is not asked
        return Capped(given.indexer, rule, given.share, Fallback())

    return OnlinePolicy(name, keep, under="cap", has=lambda indexer: calibrated(indexer, by) is not None)


def _corrected(given: Circumstances) -> Keep:
    score, correction = indexer_policy(given.indexer), given.correction
    assert correction is not None  # or the policy is not asked
    begun = False

    def keep(session: Session) -> Choice:
        nonlocal begun
        assert isinstance(session, DenseSession)
        if not begun:
            session.correct(correction)
            begun = True
        return session.best(score(session), given.share, correction.chunks)

    return keep


def learned_keys(indexer: MemoryIndexer) -> bool:
    """Whether chunk keys come from indexers of the backbone's own: it has no keys of heads to pool."""
    return indexer.spec.key != "mean_pre_rope"


ONLINE_POLICIES = [
    OnlinePolicy("indexer", lambda given: best(indexer_policy(given.indexer), given.share)),
    OnlinePolicy("indexer+correction", _corrected, corrects=True, has=lambda indexer: not learned_keys(indexer)),
    OnlinePolicy(
        "mean_pooled", lambda given: best(mean_pooled, given.share), has=lambda indexer: not learned_keys(indexer)
    ),
    OnlinePolicy("native", lambda given: best(native, given.share), has=learned_keys),
    OnlinePolicy("recency", lambda given: best(recency, given.share)),
    OnlinePolicy("random", lambda given: best(random, given.share)),
    OnlinePolicy("protected", lambda given: best(protected, given.share), under="nothing"),
    OnlinePolicy("oracle", lambda given: best(given.foresight, given.share), foresees=True),
    _capped("indexer+fallback", "threshold"),
    _capped("indexer+coverage", "coverage"),
]
"""In the order of the tables. `indexer+fallback`: the bundle's threshold under a cap, as it is served;
`indexer+coverage`: the same with its coverage;
`indexer+correction`: as many chunks as `indexer`, some of which each layer chooses at every token."""
