"""The decode cycle: fix the resident set every tau tokens, read one token at a time in between.

Policies go in step: they continue the same history, so one forward pass reads a token of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from eval.online.policies import DecodePolicy
from eval.online.session import Session

Keep = Callable[[Session], None]
"""Fixes a session's resident set from what it has read so far."""


@dataclass
class Usage:
    """What a decode run kept, summed over its steps. tokens: resident ones; bytes: of resident keys and values."""

    steps: int = 0
    refreshes: int = 0
    resident: int = 0
    total: int = 0
    bytes: int = 0

    @property
    def kept_share(self) -> float:
        """Resident tokens / all tokens, averaged over steps."""
        return self.resident / self.total

    @property
    def mean_bytes(self) -> float:
        return self.bytes / self.steps


def fidelity(log_p: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 where the likeliest next token is full attention's, KL(full || policy) in nats), of log-probs [..., V]."""
    agrees = (log_p.argmax(dim=-1) == full.argmax(dim=-1)).float()
    return agrees, (full.exp() * (full - log_p)).sum(dim=-1)


def best(policy: DecodePolicy | None, budget: float) -> Keep | None:
    """Keeps the best chunks under `budget` by the policy's scores; None keeps everything."""
    return None if policy is None else lambda session: session.keep(policy(session), budget)


@dataclass
class Run:
    """A session that goes on under one policy.

    keep: fixes the resident set, None keeps everything; follow: logits -> the next token to read, None to stop.
    """

    session: Session
    keep: Keep | None
    follow: Callable[[torch.Tensor], int | None]
    usage: Usage = field(default_factory=Usage)

    def refresh(self, tau: int) -> None:
        """Fix the resident set where a window of `tau` tokens starts."""
        if self.keep is not None and self.usage.steps % tau == 0:
            self.keep(self.session)
            self.usage.refreshes += 1

    def after(self, logits: torch.Tensor) -> int | None:
        """Count the token just read; the next one, None to stop."""
        self.usage.steps += 1
        self.usage.resident += self.session.resident_tokens
        self.usage.total += self.session.position + 1
        self.usage.bytes += self.session.cache.resident_bytes()
        return self.follow(logits)


def go_on(runs: Sequence[Run], tau: int, first: int) -> None:
    """Read `first` and what follows it, until every run has stopped; all start at the same position.

    The set in force for a token was fixed before it was read, every `tau` tokens: every predicted token, the first
    included, comes from sparse attention.
    """
    going = [(run, first) for run in runs]
    while going:
        for run, _ in going:
            run.refresh(tau)
        sessions, tokens = [run.session for run, _ in going], [token for _, token in going]
        logits = sessions[0].read_each(sessions, tokens)
        following = [(run, run.after(row)) for (run, _), row in zip(going, logits, strict=True)]
        going = [(run, token) for run, token in following if token is not None]


def generate(
    session: Session,
    policies: Mapping[str, DecodePolicy | None],
    budget: float,
    tau: int,
    first: int,
    most: int,
    ended: Callable[[list[int]], bool],
) -> dict[str, tuple[list[int], Run]]:
    """Greedy answer under each policy, of at most `most` tokens, the last one being that which made `ended` true."""
    answers: dict[str, list[int]] = {name: [] for name in policies}

    def follow(name: str, logits: torch.Tensor) -> int | None:
        answer = answers[name]
        answer.append(int(logits.argmax()))
        return None if len(answer) == most or ended(answer) else answer[-1]

    runs = {name: Run(session.fork(), best(policy, budget), partial(follow, name)) for name, policy in policies.items()}
    go_on(list(runs.values()), tau, first)
    return {name: (answers[name], run) for name, run in runs.items()}


def follow_text(
    session: Session, policies: Mapping[str, DecodePolicy | None], budget: float, tau: int, tokens: list[int]
) -> dict[str, tuple[torch.Tensor, Run]]:
    """Logits [len(tokens), vocabulary] under each policy while reading a given continuation."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in policies}

    def follow(name: str, logits: torch.Tensor) -> int | None:
        seen[name].append(logits)
        return tokens[len(seen[name])] if len(seen[name]) < len(tokens) else None

    runs = {name: Run(session.fork(), best(policy, budget), partial(follow, name)) for name, policy in policies.items()}
    go_on(list(runs.values()), tau, tokens[0])
    return {name: (torch.stack(seen[name]), run) for name, run in runs.items()}
