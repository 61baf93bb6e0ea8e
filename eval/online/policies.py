"""Ways to choose the resident set while decoding; each sees the session only, never the future."""

from collections.abc import Callable

import torch

from data_gen.core.keys import mean_pooled_scores
from eval.online.csa_session import native_indexer
from eval.online.session import Session
from indexer_train.model import MemoryIndexer

DecodePolicy = Callable[[Session], torch.Tensor]
"""A session -> scores [N] of its complete chunks."""


def indexer_policy(indexer: MemoryIndexer) -> DecodePolicy:
    """Score the session's chunks with the trained indexer at the newest token."""

    def score(session: Session) -> torch.Tensor:
        hidden, keys = session.asked(indexer.spec.layers)
        return indexer.joined_scores(hidden, keys, torch.tensor([session.position]))[0].cpu()

    return score


def mean_pooled(session: Session) -> torch.Tensor:
    """The backbone's own query at the newest token against mean-pooled keys, averaged over layers."""
    scores = []
    for layer, call in session.newest.items():
        pooled = session.cache.pooled[layer].pooled[0]
        visible = torch.tensor([pooled.shape[1]], device=pooled.device)
        query = call.unrotated(call.query[:, :, -1:], slice(-1, None))[0]
        scores.append(mean_pooled_scores(query, pooled, call.scaling, visible)[0])
    return torch.stack(scores).mean(dim=0).cpu()


def recency(session: Session) -> torch.Tensor:
    """Newest first."""
    return torch.arange(session.chunking.visible(session.position)).float()


def random(session: Session) -> torch.Tensor:
    """Uniform, a function of the position alone."""
    generator = torch.Generator().manual_seed(session.position)
    return torch.rand(session.chunking.visible(session.position), generator=generator)


def protected(session: Session) -> torch.Tensor:
    """Nothing beside the sink and the newest chunks, whatever the budget."""
    return torch.full((session.chunking.visible(session.position),), -torch.inf)


def decode_policies(indexer: MemoryIndexer) -> dict[str, DecodePolicy | None]:
    """All policies by name; None keeps everything."""
    learned = indexer.spec.key == "fp8_rope_hadamard"  # DeepSeek-V4 has indexers of its own, and no keys to pool
    return {
        "full": None,
        "indexer": indexer_policy(indexer),
        **({"native": native_indexer} if learned else {"mean_pooled": mean_pooled}),
        "recency": recency,
        "random": random,
    }
