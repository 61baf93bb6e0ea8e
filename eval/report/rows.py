"""results.json as data: a frozen model for every row, and one for the whole file.

What measures fills these models; tables, figures and the page read them (`read_results` and `write_results` are in
eval/report/tables.py). A section that was not measured is missing. Averages are *macro* (means over documents of means
over a document's windows) and intervals 95 % ones unless a field says otherwise; shares lie between 0 and 1.
"""

from typing import Any, Generic, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from data_gen.core.chunks import Chunking
from eval.report.row import CountedRow, Row

Interval = tuple[float, float]
Value = TypeVar("Value")
OpenInterval = tuple[float | None, float | None]


class Setting(Row):
    """What one verb measured, and on what: the head of the report.

    model: the backbone, by name and type; recipe: by name, None where none was given; commit: of the toolkit, None
    outside of a checkout; date: the day, ISO 8601; window: tokens between refreshes; documents: what was read, in
    words; loss: the one that trained the (first) indexer, None where its provenance does not say; hardware: in words;
    indexer: digest of the (first) indexer; results of earlier commits lack these two; first_window: tokens of the
    window that a question's last token begins, None where they are as many, or the verb asks no questions.
    """

    model: str
    recipe: str | None
    commit: str | None
    date: str
    chunking: Chunking
    window: int
    documents: str
    loss: str | None
    hardware: str | None = None
    indexer: str | None = None
    first_window: int | None = None


class RatiosOf(Row, Generic[Value]):
    """One value for each metric of indexer_train/measure/metrics.py; None where there is none."""

    mass_recall: Value | None
    golden_recall: Value | None
    precision: Value | None
    f1: Value | None
    kept: Value | None
    resident_mass: Value | None


class Ratios(RatiosOf[float]):
    """The metrics themselves, None where no window has anything to divide by."""


class RecallRow(Ratios):
    """One policy on one group of documents at one cut; the ratios are macro averages.

    policy: its name in tables: an indexer, "layer L" or "B layer L" of one, or what needs no training; indexer: whose
    scores these are ("indexer", or "A" and "B" side by side), None of the other policies; layer: the backbone layer,
    where one of the indexer's layers chose alone; task: the group (a task, or "needles": all needle tasks), in the
    sections by length and depth the name of the bin; context: longest document of the group in tokens; budget: share
    of chunks asked for, "threshold", "coverage" or "top K"; top: K of "top K", else None; micro: the ratios with all
    windows added up before dividing; interval: of the macro averages.
    """

    policy: str
    indexer: str | None = None
    layer: int | None = None
    task: str
    context: int
    budget: float | str
    top: int | None = None
    micro: Ratios
    interval: RatiosOf[Interval]
    documents: int
    windows: int


class LengthRecall(RecallRow):
    """Recall of a bin of document lengths. length: its ends, in tokens."""

    length: tuple[int, int]


class DepthRecall(RecallRow):
    """Recall of a bin of needle depths. depth: its ends, 0 the document's start."""

    depth: tuple[float, float]


class CellRecall(LengthRecall, DepthRecall):
    """Recall of a cell of needle depth and document length."""


class DocumentRow(Ratios):
    """What the (first) indexer's calibrated threshold did to one document: means over its windows.

    length: tokens; depth: where its needle lies, 0 to 1, None without one.
    """

    name: str
    task: str
    length: int
    depth: float | None


class DecayRow(Row):
    """Token-weighted mass recall in [low, high], `offset` tokens after a refresh at the traces' own window."""

    policy: str
    task: str
    offset: int
    mass_recall: float | None
    low: float | None
    high: float | None
    documents: int


class RefreshRow(Row):
    """The same of one policy that refreshes every `interval` tokens; None where nothing is known.

    churn: share of the selected chunks that a refresh fetches; fetched_chunks, fetched_bytes: a refresh;
    bytes_per_token: decoded; refreshes: how many were counted.
    """

    policy: str
    task: str
    interval: int
    mass_recall: float | None
    low: float | None
    high: float | None
    churn: float | None
    fetched_chunks: float | None
    fetched_bytes: float | None
    bytes_per_token: float | None
    documents: int
    refreshes: int


class Lookahead(Row):
    """How far a resident set can look ahead (eval/offline/refresh.py)."""

    rows: list[RefreshRow]
    decay: list[DecayRow]


class ReliabilityRow(Row):
    """Chunks of similar scores. predicted: mean of sigmoid(score); observed: share of them that is golden."""

    predicted: float
    observed: float
    chunks: int


class TimelineWindow(Row):
    """A refresh. first, last: positions it serves; candidates: unprotected chunks, [first, last); kept: chosen ones;
    ranks: per bin of chunks the best rank among candidates, 100 the best, 0 none."""

    first: int
    last: int
    candidates: tuple[int, int]
    kept: list[int]
    ranks: list[int]


class Timeline(Row):
    """One document as serving goes through it. length: tokens; chunk_tokens: in a chunk; bin_chunks: chunks that share
    a rank; needed: (position, chunk, 1 kept or 0 not) of each unprotected chunk that a token finds golden."""

    document: str
    task: str
    length: int
    chunk_tokens: int
    chunks: int
    bin_chunks: int
    budget: float
    windows: list[TimelineWindow]
    needed: list[tuple[int, int, int]]


class ComparisonRow(Row):
    """Indexers A and B on the same documents. budget, top: as in `RecallRow`; metric: one of `Ratios`; difference:
    A - B, with the paired bootstrap interval [low, high], None for fewer than two documents."""

    task: str
    budget: float | str
    top: int | None = None
    metric: str
    A: float
    B: float
    difference: float
    low: float | None
    high: float | None
    documents: int


class Evaluated(Row):
    """How recall was measured. budget: share kept where a section has one; golden: what makes a chunk golden; bins:
    names of all depths and of all lengths, in order; thresholds: of each indexer by name, in words; coverages:
    of those that have one."""

    budget: float
    golden: float
    every_token: bool
    bins: tuple[list[str], list[str]]
    notes: list[str]
    thresholds: dict[str, str]
    coverages: dict[str, str] = Field(default={})


class DecodeRow(CountedRow):
    """One policy of `lookahead decode`.

    correct of examples: needle questions whose answer holds every value, with Wilson's interval [low, high];
    agreement: share of text tokens whose most likely successor is full attention's; kl: KL(full || policy), nats a
    text token, both over `texts` texts and None without any; chunks: resident; kv_share: resident tokens / all;
    kv_mb: resident keys and values in 10^6 bytes, all three means over the tokens of the policy's own answers;
    refreshes: in the longest text.
    """

    policy: str
    correct: int
    examples: int
    low: float
    high: float
    agreement: float | None
    kl: float | None
    texts: int
    chunks: float
    kv_share: float
    kv_mb: float
    refreshes: int


class AnswerRow(Row):
    """What each policy `said` to a needle document, in the file a key each; a right answer holds all `values`."""

    document: str
    task: str
    values: list[str]
    said: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, row: Any) -> Any:
        if not isinstance(row, dict) or "said" in row:
            return row
        told = {name: row[name] for name in ("document", "task", "values") if name in row}
        return told | {"said": {name: value for name, value in row.items() if name not in told}}

    @model_serializer(mode="wrap")
    def _spread(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        row = write(self)
        return row | row.pop("said")


class _Answered(CountedRow):
    """One policy and budget on the examples of one benchmark, task and length.

    length: asked for, in tokens, None for files; budget: share kept, None of full attention; tokens: mean length;
    beyond: tokens / the longest training document; kept: resident tokens / all; kv_mb: resident keys and values in
    10^6 bytes; chunks: resident; fallbacks of windows: read with full attention, missing where that is not counted.
    """

    benchmark: str
    task: str
    length: int | None
    policy: str
    budget: float | None
    tokens: float
    beyond: float | None
    kept: float
    kv_mb: float
    chunks: float
    fallbacks: int | None = None
    windows: int | None = None


class AccuracyRow(_Answered):
    """Answers. accuracy: mean score with its interval [low, high]; difference: from full attention on the same
    examples, paired; left_out: examples that could not be asked or scored."""

    examples: int
    left_out: int
    accuracy: float
    low: float | None
    high: float | None
    difference: float
    difference_low: float | None
    difference_high: float | None


class FidelityRow(_Answered):
    """Text that is followed; intervals over texts. agreement: share of next tokens that are full attention's; kl: from
    it, nats per token; perplexity: of the text under the policy."""

    texts: int
    agreement: float
    agreement_interval: OpenInterval
    kl: float
    kl_interval: OpenInterval
    perplexity: float


class DepthRow(Row):
    """Mean score of needle tasks at one depth (ends of its bin, 0 the start) and asked length, a policy and budget."""

    policy: str
    budget: float | None
    depth: tuple[float, float]
    length: int | None
    accuracy: float
    examples: int


class Results(Row):
    """A whole results.json; None: not measured. `measured` is by verb: "evaluate", "decode", "benchmark"."""

    measured: dict[str, Setting] = Field(default={})
    recall: list[RecallRow] | None = None
    by_length: list[LengthRecall] | None = None
    by_depth: list[DepthRecall] | None = None
    heat: list[CellRecall] | None = None
    documents: list[DocumentRow] | None = None
    lookahead: Lookahead | None = None
    reliability: list[ReliabilityRow] | None = None
    timeline: Timeline | None = None
    comparison: list[ComparisonRow] | None = None
    evaluated: Evaluated | None = None
    decode: list[DecodeRow] | None = None
    answers: list[AnswerRow] | None = None
    benchmark: list[AccuracyRow] | None = None
    benchmark_text: list[FidelityRow] | None = None
    benchmark_depth: list[DepthRow] | None = None

    def with_sections(self, **sections: Any) -> Self:
        """A copy with `sections`, models or what they are made of, in place of its own; of `measured` verb by verb."""
        if "measured" in sections:
            sections["measured"] = self.measured | sections["measured"]
        return type(self).model_validate({name: getattr(self, name) for name in self.model_fields_set} | sections)

    def content(self) -> dict[str, Any]:
        """The sections that were measured, as JSON holds them."""
        found = self.model_dump()
        return {name: rows for name, rows in found.items() if rows is not None and name in self.model_fields_set}
