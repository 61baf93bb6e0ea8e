"""One definition of every metric, for training, calibration, evaluation and decoding.

Protected chunks are resident for every policy and count for nobody: only candidates enter. Averages are named: *macro*
is the mean over documents of the mean over a document's windows, *micro* adds all windows up before dividing. Two more
are in use: the *task mean* of calibration (calibration.py: macro within each task, then the mean of the
tasks), and the *token-weighted* mean of lookahead (offline/refresh.py: a document's tokens added up before dividing, as
its intervals cut it into windows of different lengths, then the mean over documents).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch

from data_gen.core.chunks import Chunking
from data_gen.core.keys import key_vectors
from data_gen.traces.labels import WindowLabels
from data_gen.traces.store import TraceDocument
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import join_layers, ranking

RATIOS = ("mass_recall", "golden_recall", "precision", "f1", "kept", "resident_mass")
"""The metrics that a Tally gives."""
DECODED_CHUNKS = 1 << 14
"""Chunks whose keys are decoded at once: that needs a few times the memory of their keys."""


@dataclass(frozen=True)
class Tally:
    """What windows needed and what a choice of chunks gave them: tensors of one shape, [W] or [W, cuts].

    visible: chunks; selected: chosen candidates; golden: golden candidates; hits: both; needed: oracle mass of all
    candidates, what the trace left out included; mass: of the selected; windows: one each, so that tallies can be
    added. A ratio is NaN where it divides by nothing.
    """

    visible: torch.Tensor
    selected: torch.Tensor
    golden: torch.Tensor
    hits: torch.Tensor
    needed: torch.Tensor
    mass: torch.Tensor
    windows: torch.Tensor

    @property
    def mass_recall(self) -> torch.Tensor:
        """Attention mass (of the indexer oracle: votes) on the selected candidates / on all of them."""
        return self.mass / self.needed

    @property
    def golden_recall(self) -> torch.Tensor:
        """Share of the golden chunks that are selected; at a cut of K chunks this is recall@K."""
        return self.hits / self.golden

    @property
    def precision(self) -> torch.Tensor:
        """Share of the selected chunks that are golden; in a window that needs nothing none is."""
        return self.hits / self.selected

    @property
    def f1(self) -> torch.Tensor:
        """Harmonic mean of precision and golden recall."""
        return 2 * self.hits / (self.selected + self.golden)

    @property
    def kept(self) -> torch.Tensor:
        """Share of the visible chunks that are selected, protected ones apart."""
        return self.selected / self.visible

    @property
    def resident_mass(self) -> torch.Tensor:
        """Share of the whole attention that is not on evicted chunks: here the protected ones do count."""
        return 1 - (self.needed - self.mass) / self.windows

    def ratios(self) -> dict[str, torch.Tensor]:
        """Every metric of RATIOS, elementwise: [W] or [W, cuts] as the counts."""
        return {name: getattr(self, name) for name in RATIOS}

    def total(self) -> Self:
        """All windows added up; the ratios of the sum are the micro averages. [W, ...] -> [...]."""
        return type(self)(**{name: value.sum(dim=0) for name, value in vars(self).items()})

    def on_host(self) -> Self:
        """The same in the host's memory."""
        return type(self)(**{name: value.cpu() for name, value in vars(self).items()})

    @classmethod
    def concatenate(cls, pieces: list[Self]) -> Self:
        """More windows; totals, which have no axis of windows, count as one each."""
        parts = {name: [torch.atleast_1d(getattr(piece, name)) for piece in pieces] for name in vars(pieces[0])}
        return cls(**{name: torch.cat(values) for name, values in parts.items()})


def tally(selected: torch.Tensor, labels: WindowLabels, golden: float, visible: torch.Tensor) -> Tally:
    """Count a choice. selected: [W, N] bool, candidates only; golden: peak that makes a chunk golden; visible: [W]."""
    truth = labels.golden(golden)
    return Tally(
        visible=visible.double(),
        selected=selected.sum(dim=1).double(),
        golden=truth.sum(dim=1).double(),
        hits=(truth & selected).sum(dim=1).double(),
        needed=needed_mass(labels),
        mass=selected_mass(selected, labels),
        windows=torch.ones_like(visible, dtype=torch.float64),
    )


def ranked_tally(
    scores: torch.Tensor, labels: WindowLabels, golden: float, visible: torch.Tensor, counts: torch.Tensor
) -> Tally:
    """Count what the best `counts` ([W, cuts]) candidates give, from one ranking of scores [W, N]. Tally of [W, cuts].

    The same as `tally(select(scores, labels.candidate, counts[:, i]), ...)` cut by cut.
    """
    order = ranking(scores, labels.candidate)
    truth = labels.golden(golden)
    available = labels.candidate.sum(dim=1, keepdim=True)
    selected = torch.minimum(counts, available)

    def best(values: torch.Tensor) -> torch.Tensor:
        """What the best-ranked chunks hold together at each cut; chunks that are not candidates hold nothing."""
        sums = values.gather(1, order).cumsum(dim=1, dtype=torch.float64)
        return torch.nn.functional.pad(sums, (1, 0)).gather(1, selected)

    one = torch.ones_like(counts, dtype=torch.float64)
    return Tally(
        visible=visible[:, None] * one,
        selected=selected.double(),
        golden=truth.sum(dim=1, keepdim=True) * one,
        hits=best(truth),
        needed=needed_mass(labels)[:, None] * one,
        mass=best(labels.mass),
        windows=one,
    )


def needed_mass(labels: WindowLabels) -> torch.Tensor:
    """Oracle mass of all candidates, what the trace left out included: [W] fp64."""
    return labels.mass.sum(dim=1, dtype=torch.float64) + labels.rest


def selected_mass(selected: torch.Tensor, labels: WindowLabels) -> torch.Tensor:
    """Oracle mass of a choice [W, N]: [W] fp64."""
    return (labels.mass * selected).sum(dim=1, dtype=torch.float64)


def mass_recall(selected: torch.Tensor, labels: WindowLabels) -> torch.Tensor:
    """`Tally.mass_recall` of a choice [W, N], without its other metrics: [W] fp32, NaN where a window needed none.

    Mass is attention probability or, of the indexer oracle, votes. What the trace did not store counts as missed.
    """
    return (selected_mass(selected, labels) / needed_mass(labels)).float()


def golden_recall(selected: torch.Tensor, labels: WindowLabels, threshold: float) -> torch.Tensor:
    """`Tally.golden_recall` of a choice [W, N]: [W] fp32, NaN where a window has no golden chunk."""
    golden = labels.golden(threshold)
    return (golden & selected).sum(dim=1) / golden.sum(dim=1)


def peak_entropy(scores: torch.Tensor, labels: WindowLabels) -> torch.Tensor:
    """Cross-entropy in nats from the softmax of `scores` [W, N] over the candidates to their peaks, normalised to one.

    [W] fp32, NaN where no candidate has a peak. What ListwisePeakLoss makes small, of the score that is served.
    """
    target = labels.peak / labels.peak.sum(dim=1, keepdim=True)
    log_probability = scores.masked_fill(~labels.candidate, -torch.inf).log_softmax(dim=1)
    return -torch.where(target == 0, 0.0, target * log_probability).sum(dim=1)


@dataclass(frozen=True)
class ServedWindows:
    """Lookahead windows of one document, as serving refreshes them unless said otherwise.

    windows: [W, 2] rows; positions: [W] of their first rows; labels: what they needed; visible: [W] chunks. The first
    two are on the host, the others where the windows are measured.
    """

    document: TraceDocument
    windows: torch.Tensor
    positions: torch.Tensor
    labels: WindowLabels
    visible: torch.Tensor

    @classmethod
    def of(cls, document: TraceDocument, windows: torch.Tensor, device: torch.device | None = None) -> Self:
        """Look up what `windows` ([W, 2]) needed; device: where they are measured, the host unless said otherwise."""
        positions = document.positions[windows[:, 0]]
        visible = (positions + 1) // document.trace.chunking.tokens
        return cls(document, windows, positions, document.labels(windows, device), visible.to(device))

    @property
    def device(self) -> torch.device:
        """Where the windows are measured."""
        return self.visible.device

    @property
    def chunking(self) -> Chunking:
        """The traces' own."""
        return self.document.trace.chunking

    def kept(self, budget: float) -> torch.Tensor:
        """[W] chunks that `budget` buys in each window."""
        return torch.tensor([self.chunking.kept(budget, p) for p in self.positions.tolist()]).to(self.device)


def served_windows(documents: Iterable[TraceDocument]) -> Iterator[ServedWindows]:
    """Every document's serving windows; documents without one, or that need nothing in any, are left out.

    Of a document's oracle the labels alone stay in memory: many keep all of what this returns.
    """
    for document in documents:
        windows = document.windows(serving=True)
        if len(windows):
            served = ServedWindows.of(document, windows)
            document.forget_oracle()
            if served.labels.mass.any():
                yield served


class DocumentScorer:
    """Scores one document's windows; its keys are decoded once."""

    def __init__(self, indexer: MemoryIndexer, document: TraceDocument) -> None:
        self.indexer = indexer
        self._document = document
        layers, width = indexer.spec.layers, indexer.spec.key_width
        self._keys = torch.empty(document.chunks, len(layers) * width, device=indexer.device)
        for place, layer in enumerate(layers):
            into = self._keys[:, place * width : (place + 1) * width].split(DECODED_CHUNKS)
            for part, stored in zip(into, document.keys(layer).split(DECODED_CHUNKS), strict=True):
                part.copy_(key_vectors(stored, indexer.device))

    @torch.no_grad()
    def layer_logits(self, served: ServedWindows) -> torch.Tensor:
        """[L, W, N] logits of the indexer's layers at each window's first token."""
        rows = served.windows[:, 0]
        hidden = torch.stack([self._document.hidden(layer)[rows].float() for layer in self.indexer.spec.layers], dim=1)
        return self.indexer.layer_logits(self.indexer.pack(hidden, served.positions), self._keys).to(served.device)

    def joined_scores(self, served: ServedWindows) -> torch.Tensor:
        """[W, N] scores that serving ranks by at each window's first token."""
        return join_layers(self.layer_logits(served), self.indexer.spec.shape.join)
