"""How answers are scored, 0 to 1, and texts compared with full attention; examples name what they want.

Answers: the published rules (more of them: eval/online/suite_scorers.py), for LongMemEval an offline one that is named
as such, and `every_value`.
"""

import re
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import Protocol

import torch

from eval.online.suite_scorers import SUITE_SCORERS, normal

Scorer = Callable[[str, list[str]], float]
"""(response, references) -> 0 ... 1."""

_CONTROL = re.compile(r"[\x00-\x1f]")
_CHOICES = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_REFUSALS = (
    "did not mention", "didn't mention", "not mentioned", "no mention", "do not know", "don't know", "not know",
    "no information", "not enough information", "not provided", "never mentioned", "cannot answer", "can't answer",
    "cannot be determined", "insufficient information",
)  # fmt: skip


def string_match_all(response: str, references: list[str]) -> float:
    """Share of the references that occur in the response, case aside (RULER: niah, vt, cwe, fwe)."""
    text = _printable(response)
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(response: str, references: list[str]) -> float:
    """1 when any reference occurs in the response, case aside (RULER: qa)."""
    text = _printable(response)
    return float(any(reference.lower() in text for reference in references))


def multiple_choice(response: str, references: list[str]) -> float:
    """1 when the letter of "The correct answer is (X)", or else of "The correct answer is X", is right (LongBench-v2).

    Asterisks are taken out first; a response of any other form is wrong.
    """
    text = response.replace("*", "")
    found = next((match for pattern in _CHOICES if (match := pattern.search(text))), None)
    return float(found is not None and found.group(1) == references[0])


def sequence_ratio(response: str, references: list[str]) -> float:
    """SequenceMatcher ratio with the answer, 0 without the prefix (OpenAI MRCR). references: answer, prefix."""
    answer, prefix = references
    if not response.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix)).ratio()


def answer_words(response: str, references: list[str]) -> float:
    """Share of the reference's words that the response contains, SQuAD's normalisation.

    An offline stand-in for LongMemEval's judge, which is an LLM: it cannot see paraphrases, and a long response that
    names everything passes. Figures are not comparable with published ones.
    """
    said, expected = set(normal(response).split()), normal(references[0]).split()
    return sum(word in said for word in expected) / len(expected) if expected else 0.0


def refusal(response: str, references: list[str]) -> float:
    """1 when the response says that it was never told (LongMemEval's `_abs` questions), by a list of phrases."""
    text = response.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return float(any(phrase in text for phrase in _REFUSALS))


def every_value(response: str, references: list[str]) -> float:
    """1 when every reference is in the response, as it is written: what is written after it changes nothing."""
    return float(all(reference in response for reference in references))


SCORERS: dict[str, Scorer] = {
    scorer.__name__: scorer
    for scorer in (
        string_match_all,
        string_match_part,
        multiple_choice,
        sequence_ratio,
        answer_words,
        refusal,
        every_value,
        *SUITE_SCORERS,
    )
}
SCORED_WITH_PREFIX = {"sequence_ratio"}
"""MRCR demands its prefix; elsewhere, as in RULER, what the model was given earns nothing."""


def fidelity(log_p: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 where the likeliest next token is full attention's, KL(full || policy) in nats), of log-probs [..., V]."""
    agrees = (log_p.argmax(dim=-1) == full.argmax(dim=-1)).float()
    return agrees, (full.exp() * (full - log_p)).sum(dim=-1)


class Follower(Protocol):
    """Compares a text that is followed with full attention. Made of (targets: the text's next tokens, the follower of
    full attention, None for that one)."""

    def add(self, logits: torch.Tensor) -> None:
        """Logits [V] after the next token of the text; full attention's come first."""
        ...

    def means(self) -> dict[str, float]:
        """Over the text's tokens: agreement with full attention, kl from it and loss in nats."""
        ...


class TokenByToken(Follower):
    """Compares as it goes and keeps the log-probabilities of full attention alone; means in double precision."""

    def __init__(self, targets: list[int], full: "TokenByToken | None") -> None:
        self._targets = targets
        self._log_p: list[torch.Tensor] = []
        self._full = self._log_p if full is None else full._log_p
        self._sums: list[tuple[float, float, float]] = []

    def add(self, logits: torch.Tensor) -> None:
        place = len(self._sums)
        log_p = logits.float().log_softmax(dim=-1)
        if self._full is self._log_p:
            self._log_p.append(log_p)
        agrees, kl = fidelity(log_p, self._full[place])
        self._sums.append((float(agrees), float(kl), -float(log_p[self._targets[place]])))

    def means(self) -> dict[str, float]:
        agreement, kl, loss = (sum(values) / len(values) for values in zip(*self._sums, strict=True))
        return {"agreement": agreement, "kl": kl, "loss": loss}


class AtOnce(Follower):
    """Keeps the logits of every policy and compares whole texts, in float32: sums of many rows are rounded otherwise
    than those of one, and this is how figures of `lookahead decode` have always been made."""

    def __init__(self, targets: list[int], full: "AtOnce | None") -> None:
        self._targets, self._full = targets, full
        self._logits: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor) -> None:
        self._logits.append(logits)

    def means(self) -> dict[str, float]:
        log_p = self._log_p()
        agrees, kl = fidelity(log_p, log_p if self._full is None else self._full._log_p())
        loss = -log_p[torch.arange(len(self._targets)), torch.tensor(self._targets)].mean()
        return {"agreement": float(agrees.mean()), "kl": float(kl.mean()), "loss": float(loss)}

    def _log_p(self) -> torch.Tensor:
        """[tokens, V]."""
        return torch.stack(self._logits).float().log_softmax(dim=-1)


FOLLOWERS: dict[str, Callable[..., Follower]] = {"token_by_token": TokenByToken, "at_once": AtOnce}


def _printable(response: str) -> str:
    return _CONTROL.sub("\n", response).strip().lower()
