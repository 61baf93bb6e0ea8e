"""Batches for the stock trainer: all query tokens of a batch come from one document."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

from data_gen.store import TraceDocument, TraceStore


def window_index(store: TraceStore) -> Dataset:
    """One row per usable lookahead window: document, first row, one past its last row (int32)."""
    columns: dict[str, list[int]] = {"document": [], "first": [], "last": []}
    for number, document in enumerate(store):
        for first, last in document.windows(serving=False).tolist():
            columns["document"].append(number)
            columns["first"].append(first)
            columns["last"].append(last)
    return Dataset.from_dict(columns)


class DocumentBatchSampler(DefaultBatchSampler):
    """Each epoch draws up to `batch_size` windows of every document, documents in random order.

    What an epoch draws is a function of (seed, epoch) alone, so that a resumed run goes on with the same batches.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool = False, seed: int = 0, **_: Any) -> None:
        super().__init__(range(len(dataset)), batch_size=batch_size, drop_last=drop_last)
        self.seed, self.epoch = seed, 0
        documents = torch.tensor(dataset["document"][:])
        self.groups = [torch.nonzero(documents == number).flatten() for number in documents.unique()]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        for number in torch.randperm(len(self.groups), generator=generator).tolist():
            group = self.groups[number]
            order = torch.randperm(len(group), generator=generator)[: self.batch_size]
            yield group[order].sort().values.tolist()


class WindowCollator:
    """Rows of the index -> query features, document features and soft labels of one document.

    query_input_features [B, L, hidden]; query_positions [B]; document_input_values [N, L, ...] as stored;
    label [B, 4, N]: window mass, window peak, candidate mask, and (in its first entry) the mass on
    protected chunks.
    """

    valid_label_columns = ("label",)

    def __init__(self, store: TraceStore, layers: list[int]) -> None:
        self.trace = store.manifest.trace
        self.paths = store.paths()
        self.layers = layers
        self.document = lru_cache(maxsize=len(self.paths))(self._open)

    def _open(self, number: int) -> TraceDocument:
        return TraceDocument(self.paths[number], self.trace)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        document = self.document(rows[0]["document"])
        windows = torch.tensor([[row["first"], row["last"]] for row in rows])
        labels = document.labels(windows)
        protected = torch.zeros_like(labels.mass)
        protected[:, 0] = 1 - labels.mass.sum(dim=1) - labels.rest
        first = windows[:, 0]
        return {
            "query_input_features": torch.stack([document.hidden(layer)[first] for layer in self.layers], dim=1),
            "query_positions": document.positions[first],
            "query_task": "query",
            "document_input_values": torch.stack([document.keys(layer) for layer in self.layers], dim=1),
            "document_task": "document",
            "label": torch.stack([labels.mass, labels.peak, labels.candidate.float(), protected], dim=1),
        }
