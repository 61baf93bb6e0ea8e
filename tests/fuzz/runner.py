"""Case after case, of each kind for the same time: what became of them is counted, and faults are kept."""

import contextlib
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.calls import Outcome, call, call_in_process
from tests.fuzz.cases import HONOURED, REFUSED, UNCHANGED, Case, files_of
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import World

LIMIT = 120
"""Seconds of the processor for one call."""
SAMPLE = 40
"""Of so many cases of a kind, the last one is tried in processes of their own as well."""

Way = Callable[[Sequence[str], float], Outcome]
"""Of calling a verb: its arguments and a limit of time -> how it ended."""
Told = tuple[int, str]
"""The exit code, and of an error its line."""


@dataclass
class Results:
    """counts: verdicts of each kind; faults: the case, what was changed, and what was wrong."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[dict[str, str]] = field(default_factory=list)

    def add(self, kind: str, case: str, what: str, verdict: str) -> None:
        """Count a case; its verdict is kept with it where it is a fault."""
        self.counts[kind][verdict.split(":")[0]] += 1
        if _is_fault(verdict):
            self.faults.append({"case": case, "changed": what, "fault": verdict})


def fuzz(
    world: World, seed: int, seconds: float, kinds: Iterable[str] = KINDS, limit: float = LIMIT, sample: int = SAMPLE
) -> Results:
    """Try cases until the time is over, at least one of each kind; case KIND/NUMBER is a function of the seed.

    sample: of so many cases, one is tried in processes of their own too; 0: none.
    """
    results, spent, numbers = Results(), dict.fromkeys(kinds, 0.0), Counter[str]()
    before, end = files_of(world.root), time.monotonic() + seconds
    while time.monotonic() < end or 0 in spent.values():
        kind = min(spent, key=lambda each: spent[each])
        number, begun = numbers[kind], time.monotonic()
        try_case(world, seed, kind, number, results, limit, bool(sample) and number % sample == sample - 1)
        numbers[kind] += 1
        spent[kind] += time.monotonic() - begun
    if files_of(world.root) != before:
        results.faults.append({"case": "all", "changed": "nothing", "fault": "a verb wrote into what it only reads"})
    return results


def try_case(
    world: World, seed: int, kind: str, number: int, results: Results, limit: float = LIMIT, apart: bool = False
) -> None:
    """Lay out one case, call its verbs and judge. apart: once more in processes of their own, which must say the same.

    A fault of either way counts, and so does a call that ends with another exit code or reason.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "case"  # the same for both, as reasons may name it

        def tried(way: Way) -> tuple[str, str, list[Told]]:
            case = KINDS[kind](world, folder, Random(f"{seed}/{kind}/{number}"))
            with contextlib.chdir(folder):
                verdict, told = _verdict(case, way, limit)
            shutil.rmtree(folder)
            return case.what, verdict, told

        what, verdict, here = tried(call)
        if apart and not _is_fault(verdict):
            _, verdict, there = tried(call_in_process)
            if not _is_fault(verdict) and here != there:
                verdict = f"unlike: {here} in this process, {there} in processes of their own"
    results.add(kind, f"{kind}/{number}", what, verdict)


def _verdict(case: Case, way: Way, limit: float) -> tuple[str, list[Told]]:
    """(what became of a case whose verbs are called in this way, what each of them told)."""
    outcomes: list[Outcome] = []
    for arguments in case.calls:
        outcome = way(arguments, limit)
        if outcome.fault:
            return f"{outcome.fault} (of {' '.join(arguments)})", []
        outcomes.append(outcome)
    return case.judge(outcomes), [(each.code, each.reason if each.refused else "") for each in outcomes]


def _is_fault(verdict: str) -> bool:
    return verdict not in (REFUSED, HONOURED, UNCHANGED)
