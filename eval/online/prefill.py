"""Prompts that begin alike: what neighbours share is read once."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from eval.online.examples import Example
from eval.online.session import Session

LEAST = 1024
"""Characters that two prompts must share for it to be worth while."""


def common(first: Sequence[int] | str, second: Sequence[int] | str) -> int:
    """Tokens, or characters, at the start of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def in_order(examples: list[Example]) -> list[tuple[Example, Example | None]]:
    """Examples so that those which begin alike are neighbours, each with its successor where they share a beginning."""
    texts = {example.name: "\n".join(message["content"] for message in example.messages) for example in examples}
    ordered = sorted(examples, key=lambda example: (texts[example.name], example.name))
    pairs: list[tuple[Example, Example | None]] = []
    for example, after in pairwise([*ordered, None]):
        alike = after is not None and common(texts[example.name], texts[after.name]) >= LEAST
        pairs.append((example, after if alike else None))
    return pairs


class Prefill:
    """Reads prompts with full attention, one after the other. opened: makes a new session."""

    def __init__(self, opened: Callable[[], Session]) -> None:
        self._opened = opened
        self._tokens: list[int] = []
        self._session: Session | None = None

    def read(self, prompt: list[int], after: list[int] | None) -> Session:
        """A session that has read `prompt`; what it shares with the prompt `after` it is kept for that one."""
        have = len(self._tokens)
        if self._session is None or have > len(prompt) or prompt[:have] != self._tokens:
            self._session, self._tokens, have = None, [], 0
        session = self._opened() if self._session is None else self._session.fork()
        shared = 0 if after is None else common(prompt, after)
        if shared > have:
            session.read(prompt[have:shared])
            self._session, self._tokens, have = session.fork(), prompt[:shared], shared
        if have < len(prompt):
            session.read(prompt[have:])
        return session
