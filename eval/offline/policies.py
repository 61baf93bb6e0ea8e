"""Ways to rank chunks without training, and the oracle that bounds them. All get the same protected chunks and budget.

Scores are [W, N] for the windows they are asked about, in the order of the document; the highest are kept.
"""

import hashlib
from collections.abc import Callable

import torch

from data_gen.traces.store import TraceDocument
from indexer_train.measure.metrics import ServedWindows

Policy = Callable[[ServedWindows], torch.Tensor]


def oracle(served: ServedWindows) -> torch.Tensor:
    """The attention mass itself: the best possible mass recall at any budget (golden recall has `golden_oracle`),
    [W, N]."""
    return served.labels.mass


def golden_oracle(served: ServedWindows) -> torch.Tensor:
    """The peaks themselves: the best possible golden recall at any budget, [W, N]."""
    return served.labels.peak


def mean_pooled(served: ServedWindows) -> torch.Tensor:
    """Mean-pooled keys scored by the backbone's own queries at the window's start, without lookahead: [W, N]."""
    pooled = served.document.mean_pooled
    assert pooled is not None  # POLICIES leaves it out of documents without
    return pooled[served.windows[:, 0]].to(served.device).float()


def used_now(served: ServedWindows) -> torch.Tensor:
    """What the backbone itself used at the window's first token, without lookahead; among equals the newer chunk:
    [W, N].

    Its exact attention, which costs all keys ("exact_attention"), or of the oracle `indexer` how many of its own
    indexers picked the chunk ("native_votes"). A trace does not keep the native logits of every token, so chunks
    without a vote are ties here; decoding ranks by the logits ("native").
    """
    first = served.windows[:, 0]
    now = torch.stack([first, first + 1], dim=1)
    return _newer_first(ServedWindows.of(served.document, now, served.device).labels.mass)


def recency(served: ServedWindows) -> torch.Tensor:
    """Newest first: [W, N]."""
    return torch.arange(served.document.chunks, device=served.device).float().expand(len(served.windows), -1)


def protected(served: ServedWindows) -> torch.Tensor:
    """No preference, [W, N]: evaluation keeps nothing for it but the sink and the newest chunks."""
    return torch.zeros(len(served.windows), served.document.chunks, device=served.device)


def golden_tokens(document: TraceDocument, golden: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks that single query tokens find golden, CSR over tokens: (pointers [T + 1], chunks [M])."""
    if document.trace.oracle == "indexer":
        found = document.golden.votes >= golden
        return _kept(document.golden.pointers, found), document.golden.chunks[found]
    found = document.attention.peak.float().mean(dim=1) >= golden
    return _kept(document.attention.pointers, found), document.attention.chunks[found]


def _kept(pointers: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """CSR pointers when only the `found` entries stay."""
    return torch.nn.functional.pad(found.cumsum(0), (1, 0))[pointers.long()]


class Frequency:
    """How many traced tokens so far, the window's first included, found a chunk golden; among equals the newer."""

    def __init__(self, document: TraceDocument, golden: float) -> None:
        self._ends, self._chunks = golden_tokens(document, golden)

    def __call__(self, served: ServedWindows) -> torch.Tensor:
        chunks = served.document.chunks
        ends = self._ends[served.windows[:, 0] + 1].tolist()
        counts = torch.stack([self._chunks[:end].bincount(minlength=chunks) for end in ends])
        return _newer_first(counts.to(served.device))


class Random:
    """Uniform, the same on every run for a document of the same name."""

    def __init__(self, document: TraceDocument) -> None:
        digest = hashlib.sha256(document.meta.name.encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def __call__(self, served: ServedWindows) -> torch.Tensor:
        scores = torch.rand(len(served.windows), served.document.chunks, generator=self._generator)
        return scores.to(served.device)


def _newer_first(scores: torch.Tensor) -> torch.Tensor:
    """[W, N] -> ranks [W, N], the newer of equals ahead (on its own, the older would be)."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1).float()


POLICIES: dict[str, Callable[[TraceDocument, float], Policy | None]] = {
    "oracle": lambda document, golden: oracle,
    "native_votes": lambda document, golden: used_now if document.trace.oracle == "indexer" else None,
    "exact_attention": lambda document, golden: used_now if document.trace.oracle == "attention" else None,
    "mean_pooled": lambda document, golden: None if document.mean_pooled is None else mean_pooled,
    "frequency": Frequency,
    "recency": lambda document, golden: recency,
    "random": lambda document, golden: Random(document),
    "protected": lambda document, golden: protected,
}
"""Every policy by name, in the order of the tables, made for a document and what makes a chunk golden; None where the
document does not allow it: DeepSeek-V4's keys are learned, nothing there is pooled. A new one joins here and gets its
line style in eval/report/tables.py."""


def policies(document: TraceDocument, golden: float) -> dict[str, Policy]:
    """All of POLICIES that `document` allows; ask each about windows in order."""
    made = {name: make(document, golden) for name, make in POLICIES.items()}
    return {name: policy for name, policy in made.items() if policy is not None}
