"""The decode cycle: fix the resident set every tau tokens, read one token at a time in between.

Policies go in step: they continue the same history, so one forward pass reads a token of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from eval.online.session import Session

Keep = Callable[[Session], None]
"""Fixes a session's resident set from what it has read so far."""


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
    """How a session goes on under one policy: it reads `given`, then writes greedily.

    session: its own, which has read the prompt; keep: fixes the resident set, None keeps everything; given: at least
    one token; asks: places in it of tokens that end a question, where a window starts, the first one always; most:
    tokens that it may write; ended: whether what it wrote so far is all, its newest token included;
    watchers: called with the session and the logits [vocabulary] behind every token that it reads; answer: the tokens
    that it wrote.
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

    def refresh(self, tau: int) -> None:
        """Fix the resident set where a window of `tau` tokens starts."""
        asked = max(place for place in self.asks if place <= self.usage.steps)
        if self.keep is not None and (self.usage.steps - asked) % tau == 0:
            self.keep(self.session)
            self.usage.refreshes += 1

    def after(self, logits: torch.Tensor) -> int | None:
        """Count the token just read; the next one, None to stop. logits: behind it, [vocabulary]."""
        self.usage.steps += 1
        self.usage.resident += self.session.resident_tokens
        self.usage.total += self.session.position + 1
        self.usage.bytes += self.session.resident_bytes
        self.usage.fetched = self.session.fetched
        for watch in self.watchers:
            watch(self.session, logits)
        if self.usage.steps < len(self.given):
            return self.given[self.usage.steps]
        if len(self.answer) < self.most:
            self.answer.append(int(logits.argmax()))
            if len(self.answer) < self.most and not self.ended(self.answer):
                return self.answer[-1]
        return None


def go_on(courses: Sequence[Course], tau: int) -> None:
    """Read and write until every course has stopped; all start at the same position.

    The set in force for a token was fixed before it was read, every `tau` tokens: every predicted token, the first
    included, comes from sparse attention.
    """
    going = [(course, course.given[0]) for course in courses]
    while going:
        for course, _ in going:
            course.refresh(tau)
        sessions, tokens = [course.session for course, _ in going], [token for _, token in going]
        logits = sessions[0].read_each(sessions, tokens)
        following = [(course, course.after(row)) for (course, _), row in zip(going, logits, strict=True)]
        going = [(course, token) for course, token in following if token is not None]
