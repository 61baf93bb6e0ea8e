"""Validated settings of the generate step: backbone, documents, trace."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data_gen.core.chunks import Chunking
from data_gen.core.config import Count, NoneOrMore, Strict


class BackboneConfig(Strict):
    """The frozen LLM.

    path: a local folder, a hub id, a .gguf file, `package:NAME/FILE` for a file inside an installed package, or `tiny`
    for a random model of three layers that is made on the spot.
    dtype: type in which the weights are loaded.
    spread: spread the layers of a DeepSeek-V4 over all visible GPUs, instead of putting the model on one device.
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    spread: bool = False


BadRows = Literal["stop", "skip"]
"""What a row does that holds neither text nor a chat."""


class DocumentsConfig(Strict):
    """Where text comes from and what documents are made of it.

    source: `builtin` (CPython's language reference, then its library's docstrings), `stdlib` (the source code of its
    library), `package:NAME` (that of an installed package), a folder of texts, a file (.jsonl, .jsonl.gz, .jsonl.zst, a
    .json list, .parquet), a glob of such files, their address as fsspec reads it (s3://BUCKET/PATH.jsonl, with its
    package for that store installed), or a `datasets` name or folder as NAME, NAME:SUBSET or NAME:SUBSET:SPLIT; or a
    list of these.
    text_field: the column or key that holds a row's text.
    bad_rows: what to do with a row that holds neither text nor a chat, and with a text or chat that makes no whole
    document (too long or too short, refused by the chat template, or a chat where `document` needs a text, or a text
    where `chat` needs messages): `stop`, or `skip` it and report how many. Files of a folder are no rows: one that is
    empty or not UTF-8 always stops the command.
    tokens: length of the shortest and of the longest document; lengths are drawn between them.
    train, heldout: how many documents of each task (see data_gen/text/needles.py; `text` is plain text).
    keys: how many needles have other keys than the one in the question (multi_key); values: how many values one key
    has (multi_value).
    thinking: let the model think before it answers, if its chat template can ask for it (Qwen3 ...).
    turns: which of a chat's answers are traced: the `last` one or `all`.
    heldout_share: share of the source's documents for the held-out side, chosen by their hashes; None: the held-out
    share of the documents asked for. A share that is set here stays the same when those numbers change.
    wordings: which wordings and key words needles of held-out documents have: `heldout`, in which recipes of this
    project were reported, or `fresh`, in which nothing was asked before they were chosen.
    seed: seed of lengths, needles and the order of texts.
    """

    source: str | list[str] = "builtin"
    text_field: str = "text"
    bad_rows: BadRows = "stop"
    tokens: tuple[Count, Count]
    train: dict[str, NoneOrMore]
    heldout: dict[str, NoneOrMore]
    keys: Count = 3
    values: Count = 2
    thinking: bool = False
    turns: Literal["last", "all"] = "last"
    heldout_share: float | None = Field(default=None, gt=0, lt=1)
    wordings: Literal["heldout", "fresh"] = "heldout"
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.tokens[0] > self.tokens[1]:
            raise ValueError("tokens must be [shortest, longest]")
        return self


class TraceConfig(Strict):
    """What a trace keeps.

    chunking: how history is cut into chunks, and which are protected;
    layers: backbone layers whose hidden states and keys the indexer sees (full-attention layers; ordinals of the
    compressed sparse attention layers on DeepSeek-V4);
    oracle: the source that says which chunks mattered: the core `attention`, or the model's own `indexer`;
    votes: how many layers' indexers must pick a chunk to make it golden (oracle `indexer`; the release: 3).
    window: tau, the lookahead in tokens; text_rows: query tokens traced at the end of a plain-text document;
    answer_lead: query tokens traced before an answer; tail: shortest window that counts when an answer ends early;
    top_chunks: attention probabilities kept per query token.
    own_tokens: most tokens that the backbone itself writes after a prompt, greedily, and that are traced in place of
    the document's answer (on-policy); 0 reads the document as it is (teacher-forced).
    """

    chunking: Chunking = Chunking()
    layers: list[NoneOrMore] = Field(min_length=1)
    oracle: Literal["attention", "indexer"] = "attention"
    votes: Count = 3
    window: Count = 64
    text_rows: Count = 320
    answer_lead: Count = 16
    tail: Count = 8
    top_chunks: Count = 256
    own_tokens: NoneOrMore = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sorted(set(self.layers)) != self.layers:
            raise ValueError("layers must be ascending and unique")
        if self.text_rows < self.window:
            raise ValueError("text_rows must cover at least one window")
        if self.tail > self.window:
            raise ValueError("tail must not exceed window")
        return self
