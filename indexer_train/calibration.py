"""Thresholds that keep a wanted share of the chunks, from the documents the indexer was trained on."""

import torch

from data_gen.store import TraceStore
from indexer_train.metrics import indexer_scores, served_windows
from indexer_train.model import MemoryIndexer


def calibrate(indexer: MemoryIndexer, store: TraceStore, budget: float) -> float:
    """The score that keeps `budget` of the visible chunks over all serving windows of `store`, protection apart."""
    scores, visible = [], 0
    for served in served_windows(store):
        scores.append(indexer_scores(indexer, served)[served.labels.candidate])
        visible += int(served.visible.sum())
    ranked = torch.cat(scores).sort(descending=True).values
    return float(ranked[min(len(ranked), max(1, round(budget * visible))) - 1])
