"""Scores of answers, 0 to 1: the published rules, and for LongMemEval an offline one that is named as such."""

import re
import string
from collections.abc import Callable
from difflib import SequenceMatcher

Scorer = Callable[[str, list[str]], float]
"""(response, references) -> 0 ... 1."""

_CONTROL = re.compile(r"[\x00-\x1f]")
_CHOICES = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
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
    said, expected = set(_words(response)), _words(references[0])
    return sum(word in said for word in expected) / len(expected) if expected else 0.0


def refusal(response: str, references: list[str]) -> float:
    """1 when the response says that it was never told (LongMemEval's `_abs` questions), by a list of phrases."""
    text = response.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return float(any(phrase in text for phrase in _REFUSALS))


SCORERS: dict[str, Scorer] = {
    scorer.__name__: scorer
    for scorer in (string_match_all, string_match_part, multiple_choice, sequence_ratio, answer_words, refusal)
}


def _printable(response: str) -> str:
    return _CONTROL.sub("\n", response).strip().lower()


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", bare).split()
