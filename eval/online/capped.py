"""The indexer as it is served: all chunks that reach its threshold, under a cap, with demand fallback above it."""

from dataclasses import dataclass, field

import torch

from eval.online.policies import indexer_policy
from eval.online.session import Session
from eval.serving.select import Fallback, Limits, Served, resident_chunks, serve
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Threshold


def calibrated(indexer: MemoryIndexer) -> Threshold | None:
    """The first threshold that the bundle carries."""
    return next((each for each in indexer.spec.selections if isinstance(each, Threshold)), None)


@dataclass
class Capped:
    """Fixes a session's resident set. share: of the chunks that may be resident beside the protected ones; fallback:
    when a window gets full attention, None for never; served: how each window so far was served."""

    indexer: MemoryIndexer
    threshold: Threshold
    share: float
    fallback: Fallback | None
    served: list[Served] = field(default_factory=list)

    def __call__(self, session: Session) -> None:
        position, chunking = session.position, session.chunking
        total, (first, last) = chunking.visible(position), chunking.candidates(position)
        cap = chunking.kept(self.share, position) + chunking.sink + chunking.recent
        scores, positions = indexer_policy(self.indexer)(session)[None], torch.tensor([position])
        resident = resident_chunks(scores, positions, chunking, self.threshold, Limits(cap=cap))
        chunks, how = serve(resident, 0, total, cap, total - (last - first), self.fallback)
        session.keep_chunks(chunks)
        self.served.append(how)
