"""The records of a trace: what a backbone tells of itself, what a document leaves behind, what a store says of both.

Every record type lives here; no backbone is needed to read one.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator

from data_gen.config import TraceConfig
from data_gen.core.errors import InputError
from data_gen.core.keys import KeyKind
from data_gen.core.rope import Rope

FORMAT = 4
"""Version of a store, its documents and what is mined beside them; readers know this one alone."""


@dataclass(frozen=True)
class BackboneInfo:
    """Facts that tie traces, indexers and bundles to one backbone.

    fingerprint: hash of the weights; full_layers: layers that see the whole history (the oracle pools over them), on
    DeepSeek-V4 the ordinals of its compressed sparse attention (CSA) layers: ordinal 10 of V4-Flash is its layer 22;
    hidden, key_width: widths of a hidden state and of one decoded chunk key; context: longest document in tokens;
    key: how keys were made; rope: the rotation in them, which queries need too, None where keys have no position;
    config: hash of what its configuration says (`config_digest`), which a store continues with alone;
    entry_bytes: what a serving engine stores of one token, on DeepSeek-V4 of one compressed entry, in all layers that
    evict; None where it is not known;
    name: what anybody can load the model by (hub id, file of a package), None for local files; it decides nothing.
    """

    model_type: str
    fingerprint: str
    full_layers: list[int]
    hidden: int
    key_width: int
    context: int
    key: KeyKind = "mean_pre_rope"
    rope: Rope | None = None
    entry_bytes: int | None = None
    config: str = ""
    name: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class NativeRow:
    """What the backbone's own indexer computed for one query token of one layer, to verify a trace against.

    logits: [n_visible], one per visible chunk; query: [H, d] after RoPE and Hadamard; weights: [H], scaled. Query and
    weights may be missing.
    """

    logits: torch.Tensor
    query: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class SparseAttention:
    """Oracle probabilities of T query tokens, the top chunks of each, CSR over tokens.

    pointers: [T + 1] int64; chunks: [M] int32, ascending within a token; mean, peak: [M, layers] fp16, the chunk's
    probability averaged over, and its maximum over, the heads of each full-attention layer; rest: [T] fp32, what the
    dropped chunks held (mean over layers and heads).
    """

    pointers: torch.Tensor
    chunks: torch.Tensor
    mean: torch.Tensor
    peak: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def from_dense(cls, mean: torch.Tensor, peak: torch.Tensor, visible: torch.Tensor, top: int) -> "SparseAttention":
        """Keep the `top` complete chunks of each token by head-max probability averaged over layers.

        mean, peak: [T, N, layers]; visible: [T], complete chunks at each token.
        """
        tokens, chunks, _ = mean.shape
        complete = torch.arange(chunks) < visible[:, None]
        order = peak.mean(dim=-1).masked_fill(~complete, -1.0)
        kept = torch.zeros_like(complete).scatter_(1, order.topk(min(top, chunks), dim=1).indices, True) & complete
        pointers = torch.zeros(tokens + 1, dtype=torch.int64)
        pointers[1:] = kept.sum(dim=1).cumsum(0)
        rest = (mean.mean(dim=-1) * (complete & ~kept)).sum(dim=1)
        index = kept.nonzero()
        return cls(pointers, index[:, 1].to(torch.int32), mean[kept].half(), peak[kept].half(), rest.float())

    @classmethod
    def concatenate(cls, pieces: list[Self]) -> Self:
        """One after the other."""
        counts = torch.cat([piece.pointers.diff() for piece in pieces])
        rest = (torch.cat([getattr(p, name) for p in pieces]) for name in ("chunks", "mean", "peak", "rest"))
        return cls(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), *rest)


@dataclass(frozen=True)
class GoldenChunks:
    """Golden chunks of T query tokens, CSR over tokens.

    pointers: [T + 1] int64; chunks: [M] int32; votes: [M] int32, how many CSA layers picked the chunk.
    """

    pointers: torch.Tensor
    chunks: torch.Tensor
    votes: torch.Tensor

    @classmethod
    def from_votes(cls, votes: torch.Tensor, least: int) -> Self:
        """votes: [T, N], layers that picked each chunk; those with at least `least` are golden."""
        golden = votes >= least
        pointers = torch.nn.functional.pad(golden.sum(dim=1).cumsum(0), (1, 0))
        return cls(pointers.cpu(), golden.nonzero()[:, 1].to("cpu", torch.int32), votes[golden].to("cpu", torch.int32))

    @classmethod
    def concatenate(cls, pieces: list[Self]) -> Self:
        """One after the other."""
        counts = torch.cat([piece.pointers.diff() for piece in pieces])
        pointers = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(pointers, torch.cat([p.chunks for p in pieces]), torch.cat([p.votes for p in pieces]))


@dataclass(frozen=True)
class RawTrace:
    """What one document leaves behind, T query tokens and N complete chunks.

    hidden: layer -> [T, hidden] bf16, entering the attention block; keys: layer -> [N, ...], see `KeyKind`;
    positions: [T] int64; oracle: attention probabilities or the native indexer's votes;
    mean_pooled: [T, N] fp16, the untrained baseline's scores of dense backbones;
    native: (layer, row) -> what the native indexer computed there; near_ties: query tokens x layers whose recomputed
    top-k differs from the backbone's own picks, by ties at the cut alone.
    """

    hidden: dict[int, torch.Tensor]
    keys: dict[int, torch.Tensor]
    positions: torch.Tensor
    oracle: SparseAttention | GoldenChunks
    mean_pooled: torch.Tensor | None = None
    native: dict[tuple[int, int], NativeRow] = field(default_factory=dict)
    near_ties: int = 0


class Span(BaseModel):
    """A contiguous run of traced query tokens, as rows of the document's tensors.

    first, last: first row and one past the last; serve: the row at which serving would fix its first resident set;
    tail: whether windows cut short by the end of the span count (an answer that ends early) or not (cut text).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: int
    last: int
    serve: int
    tail: bool


class DocumentMeta(BaseModel):
    """What is known of one traced document.

    length: tokens; depth: where its asked needle lies, 0 (start) to 1; near_ties: see RawTrace.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: str
    length: int
    spans: list[Span]
    depth: float | None = None
    near_ties: int = 0


class Manifest(BaseModel):
    """What every document of a store shares.

    documents: their settings; plan: (name, content hash) of each document that a finished store has, by its number; of
    an imported one the hash is of its dump; versions: of the packages that read them; id: of the settings, repeated in
    each document's file.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[4] = FORMAT
    backbone: BackboneInfo
    trace: TraceConfig
    documents: dict[str, Any]
    plan: dict[NonNegativeInt, tuple[str, str]]
    versions: dict[str, str]
    id: str = ""

    @model_validator(mode="after")
    def _identified(self) -> Self:
        if not self.id:
            made_of = self.model_dump_json(include={"trace", "documents"}) + self.backbone.fingerprint
            self.id = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        return self

    def planned(self, number: int) -> "Planned":
        """What the file of document `number` is. Raises InputError when there is no such document."""
        if number not in self.plan:
            raise InputError(f"document {number}: not in the plan of these traces")
        return Planned(self.id, *self.plan[number])


class Planned(NamedTuple):
    """What a document's file says it is: id of its store's settings, name, content hash."""

    store: str
    name: str
    content: str
