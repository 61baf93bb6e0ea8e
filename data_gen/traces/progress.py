"""How far the workers of a plan are, from what lies on disk alone: the sizes and times of the finished files."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from data_gen.core.files import whole
from data_gen.traces.failures import failed
from data_gen.traces.store import file_of

PLAN = "plan.parquet"
"""What is to be traced, see data_gen/text/plan.py."""
REMEDY = "delete it and generate again; finished traces of the same documents stay"
LATEST = 100
"""Finished documents whose times say how fast the work goes now."""
PAUSE = 10
"""Times as many seconds a token as usual: nobody worked in between."""


@dataclass(frozen=True)
class PlanProgress:
    """sides, documents, tokens: of the plan; done, done_tokens, bytes: of what is there; failed: documents that could
    not be traced and are not there; latest: when the latest one was finished, in seconds since 1970, None where none is
    there; rate: tokens a second of the latest ones while there was work, all workers together, None where fewer than
    two are there."""

    sides: list[str]
    documents: int
    tokens: int
    done: int
    done_tokens: int
    bytes: int
    failed: int
    latest: float | None
    rate: float | None

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take."""
        return None if not self.rate else (self.tokens - self.done_tokens) / self.rate

    def __str__(self) -> str:
        speed = "" if self.rate is None else f", {self.rate:,.0f} tokens/s"
        left = "" if self.left is None or self.done == self.documents else f", {self.left / 60:,.1f} minutes left"
        when = "" if self.latest is None else f", the latest at {datetime.fromtimestamp(self.latest):%Y-%m-%d %H:%M:%S}"
        size = f"{self.bytes / 2**20:,.1f} MiB"
        return f"{self.done} of {self.documents} documents, {self.failed} failed, {size}{when}{speed}{left}"


def progress_of(out: Path) -> PlanProgress:
    """Of the plan in `out` and its stores. Raises InputError when the plan is damaged."""
    planned: dict[str, list[tuple[str, int]]] = defaultdict(list)  # name, tokens
    with whole(out / PLAN, "plan", REMEDY):
        for row in pq.read_table(out / PLAN, columns=["side", "document", "length"]).to_pylist():
            planned[row["side"]].append((row["document"], row["length"]))
    found: list[tuple[float, int, int]] = []  # when, tokens, bytes
    finished: set[str] = set()
    for side, own in planned.items():
        places = {out / side / file_of(number): each for number, each in enumerate(own)}
        for path in (out / side).glob("*/doc_*.safetensors"):
            if path in places:  # a copy by another name is no document
                (name, tokens), state = places[path], path.stat()
                found.append((state.st_mtime, tokens, state.st_size))
                finished.add(name)
    latest = sorted(found)[-LATEST:]
    return PlanProgress(
        sides=sorted(planned),
        documents=sum(map(len, planned.values())),
        tokens=sum(tokens for own in planned.values() for _, tokens in own),
        done=len(found),
        done_tokens=sum(tokens for _, tokens, _ in found),
        bytes=sum(size for *_, size in found),
        failed=len(set(failed(out)) - finished),
        latest=latest[-1][0] if latest else None,
        rate=_rate([(when, tokens) for when, tokens, _ in latest]),
    )


def _rate(finished: list[tuple[float, int]]) -> float | None:
    """Tokens a second of documents, (when it was finished, tokens) in order; pauses of all workers are left out."""
    took = [(later - earlier, tokens) for (earlier, _), (later, tokens) in pairwise(finished)]
    if not took:
        return None
    usual = median(seconds / tokens for seconds, tokens in took)
    worked = [(seconds, tokens) for seconds, tokens in took if not usual or seconds / tokens <= PAUSE * usual]
    seconds = sum(seconds for seconds, _ in worked)
    return sum(tokens for _, tokens in worked) / seconds if seconds else None
