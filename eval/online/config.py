"""Validated settings of `lookahead decode` and `lookahead benchmark`."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from data_gen.core.config import Count, NoneOrMore, Strict
from data_gen.core.errors import InputError
from eval.runtime.correction import Correction

GeneratedTask = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "aggregation", "text", "mrcr"
]  # fmt: skip
TASKS: list[GeneratedTask] = list(get_args(GeneratedTask))


def _known_policy(value: Any) -> Any:
    from eval.online.online_policies import ONLINE_POLICIES  # torch, which recipes that name none are read without

    return _one_of([policy.name for policy in ONLINE_POLICIES], value)


def _known_format(value: Any) -> Any:
    from eval.online.formats import FORMATS  # transformers, likewise

    return _one_of(list(FORMATS), value)


def _one_of(known: list[str], value: Any) -> Any:
    if value not in known:
        listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": listed})
    return value


PolicyName = Annotated[str, BeforeValidator(_known_policy)]
FormatName = Annotated[str, BeforeValidator(_known_format)]
Share = Annotated[float, Field(gt=0, le=1)]


class DecodeConfig(Strict):
    """budget: share of chunks kept on top of the protected ones; answer_tokens: longest generated answer;
    text_documents, text_tokens: plain-text documents whose last tokens are followed under each policy; correction: of
    `indexer+correction`, which is not decoded without."""

    budget: float = Field(default=0.1, gt=0, le=1)
    answer_tokens: Count = 40
    text_documents: NoneOrMore = 2
    text_tokens: Count = 256
    correction: Correction | None = None


class BenchmarkFile(Strict):
    """A published benchmark.

    source: .json, .jsonl, .parquet or a `datasets` name, with its subset and split; limit: its first examples only.
    """

    format: FormatName
    source: str
    subset: str | None = None
    split: str = "train"
    limit: Count | None = None


class BenchmarkConfig(Strict):
    """What `lookahead benchmark` asks.

    lengths: of generated examples in tokens; None: the longest that the indexer was trained on; twice that is asked
    too where no given one is longer than trained and the context allows it; tasks: generated ones; `mrcr`, the dense
    demand where sparse attention is known to fail, is asked with them in any case; none beside files: the files only,
    for models that read no text of ours (a line says that mrcr was not asked); `text` is plain text to follow;
    examples: of each task and length; texts: of each length; text_tokens: followed of each text; budgets: shares of
    chunks kept on top of the protected ones; policies: beside full attention, names of `ONLINE_POLICIES`, None for
    all; cap: as budgets, for `indexer+fallback`: windows that ask for more are read with full attention; correction: of
    `indexer+correction`, which is not asked without; keys, values, queries, hops: sizes of the needle tasks; common:
    words to find by `aggregation`; haystack: plain text that training has not seen, a source as documents.source is;
    None: what the indexer's training held out; files: published benchmarks.
    """

    lengths: list[Count] | None = None
    tasks: list[GeneratedTask] = Field(default=TASKS)
    examples: Count = 20
    texts: Count = 4
    text_tokens: Count = 256
    budgets: list[Share] = Field(default=[0.1], min_length=1)
    policies: list[PolicyName] | None = None
    cap: Share = 0.2
    correction: Correction | None = None
    keys: Count = 3
    values: Count = 2
    queries: Count = 2
    hops: Count = 3
    common: Count = 10
    haystack: str | None = None
    files: list[BenchmarkFile] = Field(default=[])
    seed: NoneOrMore = 0

    @model_validator(mode="after")
    def _corrected(self) -> Self:
        if self.correction is None and "indexer+correction" in (self.policies or []):
            raise ValueError("policy indexer+correction needs a correction, {chunks: 8} for example")
        return self

    def changed(self, files: list[str], **given: Any) -> Self:
        """A copy with what was `given` (None and [] were not) and more files, FORMAT=SOURCE each.

        Files without tasks beside them are asked with mrcr alone, unless there were no tasks before. Raises InputError
        for what does not fit.
        """
        given = {name: value for name, value in given.items() if value}
        if files:
            more = [dict(zip(("format", "source"), file.split("=", 1), strict=False)) for file in files]
            given = {"tasks": self.tasks and ["mrcr"]} | given | {"files": [*self.model_dump()["files"], *more]}
        try:
            return type(self).model_validate(self.model_dump() | given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"benchmark.{where}: {first['msg']} ({first['input']})") from error
