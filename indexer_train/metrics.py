"""One definition of every recall, for training, calibration and evaluation.

Protected chunks are resident for every policy and count for nobody: only candidates enter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data_gen.oracle import WindowLabels
from data_gen.store import TraceDocument
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import join_layers


def mass_recall(selected: torch.Tensor, labels: WindowLabels) -> torch.Tensor:
    """Mass of each window on selected candidates / on all candidates: [W] fp32, NaN where a window needed none.

    Mass is attention probability or, of the indexer oracle, votes. What the trace did not store counts as missed.
    """
    return (labels.mass * selected).sum(dim=1) / (labels.mass.sum(dim=1) + labels.rest)


def golden_recall(selected: torch.Tensor, labels: WindowLabels, threshold: float) -> torch.Tensor:
    """Share of each window's golden chunks that are selected: [W] fp32, NaN where a window has none."""
    golden = labels.golden(threshold)
    return (golden & selected).sum(dim=1) / golden.sum(dim=1)


@dataclass(frozen=True)
class ServedWindows:
    """The windows of one document as serving refreshes them.

    windows: [W, 2] rows; positions: [W] of their first rows; labels: what they needed; visible: [W] chunks.
    """

    document: TraceDocument
    windows: torch.Tensor
    positions: torch.Tensor
    labels: WindowLabels
    visible: torch.Tensor

    def kept(self, budget: float) -> torch.Tensor:
        """[W] chunks that `budget` buys in each window."""
        chunking = self.document.trace.chunking
        return torch.tensor([chunking.kept(budget, p) for p in self.positions.tolist()])


def served_windows(documents: Iterator[TraceDocument]) -> Iterator[ServedWindows]:
    """Every document's serving windows; documents without one, or that need nothing in any, are left out."""
    for document in documents:
        windows = document.windows(serving=True)
        if len(windows):
            positions = document.positions[windows[:, 0]]
            visible = (positions + 1) // document.trace.chunking.tokens
            served = ServedWindows(document, windows, positions, document.labels(windows), visible)
            if served.labels.mass.any():
                yield served


def layer_scores(indexer: MemoryIndexer, served: ServedWindows) -> torch.Tensor:
    """[L, W, N] scores of the indexer's layers at each window's first token."""
    document, layers = served.document, indexer.spec.layers
    rows = served.windows[:, 0]
    hidden = torch.stack([document.hidden(layer)[rows].float() for layer in layers], dim=1)
    keys = torch.stack([document.keys(layer) for layer in layers], dim=1)
    return indexer.layer_scores(hidden, keys, served.positions).cpu()


def indexer_scores(indexer: MemoryIndexer, served: ServedWindows) -> torch.Tensor:
    """[W, N] scores that serving ranks by at each window's first token."""
    return join_layers(layer_scores(indexer, served), indexer.spec.shape.join)
