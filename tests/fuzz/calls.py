"""A verb called in this process under a limit of time: how it ended, and what is wrong with that."""

import contextlib
import io
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from unittest.mock import patch

import cli

ROOT = Path(__file__).parents[2]
PREFIX = "lookahead: "
DAMAGED = "DAMAGED "
BEGINNING = 60
"""Seconds of the processor for a process of its own to begin in."""
OTHERS = 5
"""As many seconds may pass for each of the processor's: others use the machine too, and a hang may sleep."""


@dataclass(frozen=True)
class Outcome:
    """code: of the exit; printed, complained: standard output and error; fault: what no call may do, else empty."""

    code: int
    printed: str
    complained: str
    fault: str = ""

    @property
    def refused(self) -> bool:
        """Whether it ended in an error that people can read."""
        return self.code != 0 and not self.fault

    @property
    def reason(self) -> str:
        """The line that says why, or the first of those that `inspect` prints."""
        damaged = [line for line in self.printed.splitlines() if line.startswith(DAMAGED)]
        return [*damaged, *self.complained.splitlines()[-1:], ""][0]


class _TooLong(BaseException):
    """Not an Exception: no boundary may turn it into a line."""


@contextlib.contextmanager
def _limited(seconds: float, clock: int, alarm: signal.Signals) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(alarm, stop)
    signal.setitimer(clock, seconds, 1)  # again and again, where a destructor swallows it
    try:
        yield
    finally:
        signal.setitimer(clock, 0)
        signal.signal(alarm, before)


def call(arguments: Sequence[str], seconds: float) -> Outcome:
    """Call the command as its own process would, but for signals.

    seconds: of the processor that it may take; `OTHERS` times as many may pass.
    """
    out, err = io.StringIO(), io.StringIO()
    code, fault = 0, ""
    with (
        patch.object(cli, "heed_signals", lambda: None),
        patch.object(sys, "argv", ["lookahead", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            with (
                _limited(seconds, signal.ITIMER_PROF, signal.SIGPROF),
                _limited(OTHERS * seconds, signal.ITIMER_REAL, signal.SIGALRM),
            ):
                cli.main()
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except _TooLong as error:
            fault = f"hang: more than {seconds:g} s{_deepest(error)}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # panics of the Rust libraries are no Exceptions
            fault = f"traceback: {type(error).__name__}: {str(error)[:200]}{_deepest(error)}"
    outcome = Outcome(code, out.getvalue(), err.getvalue(), fault)
    return outcome if fault else Outcome(code, outcome.printed, outcome.complained, _unreadable(outcome))


def call_in_process(arguments: Sequence[str], seconds: float) -> Outcome:
    """Call the command in a process of its own. seconds: as `call`, after `BEGINNING`."""
    limit = ceil(BEGINNING + seconds)
    command = ["sh", "-c", f'ulimit -St {limit} && exec "$@"', "sh", sys.executable, str(ROOT / "cli.py"), *arguments]
    hang = Outcome(0, "", "", f"hang: more than {limit} s in a process of its own")
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=OTHERS * limit)
    except subprocess.TimeoutExpired:
        return hang
    if done.returncode == -signal.SIGXCPU:
        return hang
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    return Outcome(done.returncode, done.stdout, done.stderr, _unreadable(outcome))


def _deepest(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)] or list(frames)
    return "".join(f" <- {Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(own[-3:]))


def _unreadable(outcome: Outcome) -> str:
    """What is wrong with how an error was told."""
    lines = outcome.complained.splitlines()
    if "Traceback (most recent call last)" in outcome.complained:
        return f"traceback: {lines[-1][:200]}"
    if outcome.code == 0:
        return ""
    if outcome.code == 1 and DAMAGED in outcome.printed:
        told = outcome.printed[outcome.printed.index(f"\n{DAMAGED}") + 1 :].splitlines()
        stray = next((line for line in told if not line.startswith(DAMAGED)), None)
        return "" if stray is None else f"more than a line: {stray[:200]}"
    if outcome.code in (1, 2) and lines and lines[-1].startswith(PREFIX):
        return ""
    return f"no line: code {outcome.code}, {lines[-1][:200] if lines else 'nothing said'!r}"
