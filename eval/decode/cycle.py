"""The decode cycle: fix the resident set every tau tokens, read one token at a time in between."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from eval.decode.policies import DecodePolicy
from eval.decode.session import Session

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


def steps(
    session: Session,
    keep: Keep | None,
    tau: int,
    first: int,
    follow: Callable[[torch.Tensor], int | None],
    usage: Usage,
) -> Iterator[torch.Tensor]:
    """Logits after each token, the resident set fixed by `keep` every `tau` tokens.

    first: the token to read first; follow: logits -> the next token to read, None to stop. The set in force for a
    token was fixed before it was read: every predicted token, the first included, comes from sparse attention.
    """
    token: int | None = first
    while token is not None:
        if keep is not None and usage.steps % tau == 0:
            keep(session)
            usage.refreshes += 1
        logits = session.read([token])
        usage.steps += 1
        usage.resident += session.resident_tokens
        usage.total += session.position + 1
        usage.bytes += session.cache.resident_bytes()
        yield logits
        token = follow(logits)


def generate(
    session: Session, policy: DecodePolicy | None, budget: float, tau: int, first: int, most: int, stop: set[int]
) -> tuple[list[int], Usage]:
    """Greedy answer of at most `most` tokens, ended by a token of `stop`."""
    answer: list[int] = []
    usage = Usage()

    def follow(logits: torch.Tensor) -> int | None:
        token = int(logits.argmax())
        answer.append(token)
        return None if token in stop or len(answer) == most else token

    for _ in steps(session, best(policy, budget), tau, first, follow, usage):
        pass
    return answer, usage


def follow_text(
    session: Session, policy: DecodePolicy | None, budget: float, tau: int, tokens: list[int]
) -> tuple[torch.Tensor, Usage]:
    """Logits [len(tokens), vocabulary] while reading a given continuation."""
    usage = Usage()
    rest = iter(tokens[1:])
    keep = best(policy, budget)
    logits = list(steps(session, keep, tau, tokens[0], lambda _: next(rest, None), usage))
    return torch.stack(logits), usage
