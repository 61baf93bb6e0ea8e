"""Policies go on in step: they continue the same history, so one forward pass reads a token of each.

When a resident set is chosen again is the runtime's rule (eval/runtime/cycle.py), whoever chooses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from eval.online.session import Session
from eval.runtime.cycle import Choice, DecodeCycle, Refresh

Keep = Callable[[Session], Choice]
"""What should be resident in a session, from what it has read so far."""


@dataclass
class Usage:
    """What a course kept, summed over its steps. resident, total: tokens; bytes: of resident keys and values; fetched:
    chunks that came back from the cold side."""

    steps: int = 0
    refreshes: int = 0
    resident: int = 0
    total: int = 0
    bytes: int = 0
    fetched: float = 0

    @property
    def kept_share(self) -> float:
        """Resident tokens / all tokens, averaged over steps."""
        return self.resident / self.total

    @property
    def mean_bytes(self) -> float:
        """Bytes of resident keys and values, averaged over steps."""
        return self.bytes / self.steps


@dataclass
class Course:
    """How a session continues under one policy: it reads `given`, then writes greedily.

    session: its own, which has read the prompt; keep: chooses the resident set, None keeps everything; given: at least
    one token; asks: places in it of tokens that end a question, where a window starts, the first one always; most:
    tokens that it may write; ended: whether what it wrote so far is all, its newest token included;
    watchers: called with the session and the logits [vocabulary] after every token that it reads; answer: the tokens
    that it wrote; windows: what every refresh did.
    """

    session: Session
    keep: Keep | None
    given: list[int]
    most: int = 0
    ended: Callable[[list[int]], bool] = lambda answer: False
    watchers: list[Callable[[Session, torch.Tensor], None]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    answer: list[int] = field(default_factory=list)
    asks: list[int] = field(default_factory=lambda: [0])
    _cycle: DecodeCycle | None = None

    @property
    def windows(self) -> list[Refresh]:
        """What was resident, window after window; none without a policy."""
        return [] if self._cycle is None else self._cycle.windows

    def begin(self, tau: int, first: int | None) -> None:
        """Windows of `tau` tokens from here on, those that a question begins of `first`."""
        if self.keep is not None:  # the cycle knows the session, not the course: what is over is freed at once
            self._cycle = DecodeCycle(self.session.host, tau, partial(self.keep, self.session), first=first)

    def refresh(self) -> None:
        """Choose the resident set again where a window starts; there is none before the first token of all is read."""
        if self._cycle is None or self._cycle.host.position < 0:
            return
        if self.usage.steps in self.asks or not self.windows:
            self._cycle.refresh()
        else:
            self._cycle.advance()

    def after(self, logits: torch.Tensor) -> int | None:
        """Count the token just read; the next one, None to stop. logits: after it, [vocabulary]."""
        self.usage.steps += 1
        self.usage.resident += self.session.resident_tokens
        self.usage.total += self.session.position + 1
        self.usage.bytes += self.session.resident_bytes
        self.usage.refreshes = len(self.windows)
        self.usage.fetched = sum(window.fetched for window in self.windows) + self.session.corrected
        for watch in self.watchers:
            watch(self.session, logits)
        if self.usage.steps < len(self.given):
            return self.given[self.usage.steps]
        if len(self.answer) < self.most:
            self.answer.append(int(logits.argmax()))
            if len(self.answer) < self.most and not self.ended(self.answer):
                return self.answer[-1]
        return None


def go_on(courses: Sequence[Course], tau: int, first: int | None = None) -> None:
    """Read and write until every course has stopped; all start at the same position.

    The set in force for a token was fixed before it was read, every `tau` tokens: every predicted token, the first
    included, comes from sparse attention. first: tokens of the window that a question's last token begins, None: tau.
    """
    for course in courses:
        course.begin(tau, first)
    going = [(course, course.given[0]) for course in courses]
    while going:
        for course, _ in going:
            course.refresh()
        sessions, tokens = [course.session for course, _ in going], [token for _, token in going]
        logits = sessions[0].read_each(sessions, tokens)
        following = [(course, course.after(row)) for (course, _), row in zip(going, logits, strict=True)]
        going = [(course, token) for course, token in following if token is not None]
