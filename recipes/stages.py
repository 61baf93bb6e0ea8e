"""What `lookahead run` says of its stages: what they do, how long they took once, and how long they take here."""

from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, TypeVar

from data_gen.core.tell import Say
from recipes.schema import Stage, Took

Result = TypeVar("Result")

STAGES: dict[Stage, str] = {
    "generate": "the model reads the documents and leaves traces",
    "train": "an indexer is trained on the traces, without the model",
    "evaluate": "recall on held-out traces, beside baselines and the oracle",
    "export": "the bundle is written",
    "decode": "the model decodes held-out documents with the bundle, beside baselines",
}
PACE = 3
"""Documents that are traced before the pace of this machine is told."""


class Stages:
    """The stages of one run, in order.

    took: the seconds that the recipe says, None where it says none; documents: how many the plan holds; say: where
    each line goes.
    """

    def __init__(self, took: Took | None, documents: int, say: Say) -> None:
        self.took, self.documents, self.say = took, documents, say
        self.seconds: dict[Stage, float] = {}
        self.pace_told = False
        for name, what in STAGES.items():
            time = "" if took is None else f" {in_words(took.seconds[name]):>12}"
            say(f"  {name:8}{time}  {what}")
        say(f"times: {'not measured for these settings' if took is None else took.where}; a stopped run continues")

    def do(self, name: Stage, step: Callable[[], Result]) -> Result:
        """Announce a stage, do it, and note how long it took; returns what it returns."""
        self.say(f"[{len(self.seconds) + 1}/{len(STAGES)}] {name}")
        since = monotonic()
        found = step()
        self.seconds[name] = monotonic() - since
        return found

    def end(self) -> None:
        """Say how long every stage took."""
        self.say(f"seconds: {', '.join(f'{name} {seconds:.1f}' for name, seconds in self.seconds.items())}")

    def paced(self, items: Iterable[Any]) -> Iterator[Any]:
        """Documents to be traced; when a few are done, say how long all stages take at their pace."""
        since = monotonic()
        for done, item in enumerate(items):
            if done == PACE and self.took is not None and not self.pace_told:
                self.pace_told = True
                pace = (monotonic() - since) / PACE * self.documents / self.took.seconds["generate"]
                times = (f"{name} {in_words(pace * seconds)}" for name, seconds in self.took.seconds.items())
                self.say(f"at the pace of the first {PACE} documents: {', '.join(times)}")
            yield item


def in_words(seconds: float) -> str:
    """A duration to two units: 45 s, 8 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
