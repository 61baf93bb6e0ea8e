"""Validated settings of `lookahead decode` and `lookahead benchmark`."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from data_gen.core.config import Count, NoneOrMore, Strict
from data_gen.core.errors import InputError
from eval.online.formats import FORMATS
from eval.runtime.correction import Correction

GeneratedTask = Literal[
    "single", "multi_key", "multi_value", "multi_query", "variable_tracking", "aggregation", "text", "mrcr"
]  # fmt: skip
TASKS: list[GeneratedTask] = list(get_args(GeneratedTask))


def _known_policy(value: Any) -> Any:
    from eval.online.online_policies import ONLINE_POLICIES  # torch, which recipes that name none are read without

    return _one_of([policy.name for policy in ONLINE_POLICIES], value)


def _known_format(value: Any) -> Any:
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
    """What `lookahead decode` does with the held-out documents.

    budget: share of chunks kept on top of the protected ones; answer_tokens: tokens of the longest generated answer;
    text_documents: plain-text documents that are followed under each policy; text_tokens: how many of their last
    tokens are followed; correction: settings of the policy `indexer+correction`; None: it is not decoded;
    first_window: tokens of the window that a question's last token, or a `--prompt`'s, begins, 1 to choose again behind
    it; None: as of every other.
    """

    budget: float = Field(default=0.1, gt=0, le=1)
    answer_tokens: Count = 40
    text_documents: NoneOrMore = 2
    text_tokens: Count = 256
    correction: Correction | None = None
    first_window: Count | None = None


class BenchmarkFile(Strict):
    """A published benchmark.

    format: the publisher's form of it, one of `FORMATS`; source: a .json, .jsonl or .parquet file, or a `datasets`
    name; subset: subset of such a data set; split: split of such a data set; limit: how many examples are asked, the
    first ones; None: all.
    """

    format: FormatName
    source: str
    subset: str | None = None
    split: str = "train"
    limit: Count | None = None


class BenchmarkConfig(Strict):
    """What `lookahead benchmark` asks.

    lengths: lengths of generated examples in tokens; None: the longest that the indexer was trained on; twice that is
    asked too where no given one is longer than trained and the context allows it; tasks: generated tasks to ask;
    `mrcr`, the dense demand where sparse attention is known to fail, is asked with them in any case; an empty list
    beside files: the files only, for models that read no text of ours (a line says that mrcr was not asked); `text` is
    plain text to follow; examples: examples of each task and length; texts: plain texts of each length;
    text_tokens: how many tokens of each text are followed; budgets: shares of chunks kept on top of the protected ones;
    policies: names of `ONLINE_POLICIES` that are compared beside full attention; None: all; cap: share of the chunks
    above which `indexer+fallback` and `indexer+coverage` read a window with full attention; correction: settings of
    the policy `indexer+correction`; None: it is not asked; first_window: as of `decode`; keys: needles with other
    keys than the one in the question (multi_key); values: values of one key (multi_value); queries: keys that one
    question asks for (multi_query); hops: assignments after the first in a chain (variable_tracking); common: how
    many most common words `aggregation` asks for;
    haystack: plain text that training has not seen, a source as documents.source is; None: what the indexer's training
    held out; files: published benchmarks to ask as well; seed: seed of the generated examples.
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
    first_window: Count | None = None
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
        given = {name: value for name, value in given.items() if value not in (None, [])}
        if files:
            more = [dict(zip(("format", "source"), file.split("=", 1), strict=False)) for file in files]
            given = {"tasks": self.tasks and ["mrcr"]} | given | {"files": [*self.model_dump()["files"], *more]}
        try:
            return type(self).model_validate(self.model_dump() | given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"benchmark.{where}: {first['msg']} ({first['input']})") from error
