"""Attention traces with top-p votes for labels, where training reads them."""

from functools import cached_property
from pathlib import Path

from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.traces.labels import GoldenChunks, top_p_votes
from data_gen.traces.store import TraceDocument, TraceStore
from indexer_train.config import TopPVotes


class VotedStore(TraceStore):
    """The documents of a store of the attention oracle, labelled by `rule`. Raises InputError where it cannot apply."""

    def __init__(self, store: TraceStore, rule: TopPVotes) -> None:
        super().__init__(store.root, store.manifest, store.paths())
        if store.manifest.trace.oracle != "attention":
            raise InputError(
                f"{store.root}: its labels are votes of the backbone's own indexers; leave train.top_p_votes out"
            )
        if rule.votes > len(store.manifest.backbone.full_layers):
            raise InputError(
                f"train.top_p_votes.votes: {rule.votes}, but {len(store.manifest.backbone.full_layers)} layers vote in "
                f"{store.root}"
            )
        self.rule = rule

    def document(self, path: Path) -> TraceDocument:
        return VotedDocument(path, self.manifest.trace, self.rule)


class VotedDocument(TraceDocument):
    """A document that shows its votes as a trace of the indexer oracle does."""

    def __init__(self, path: Path, trace: TraceConfig, rule: TopPVotes) -> None:
        super().__init__(path, trace.model_copy(update={"oracle": "indexer"}))
        self.rule = rule

    @cached_property
    def golden(self) -> GoldenChunks:
        return top_p_votes(self.attention, self.rule.top_p, self.rule.votes)
