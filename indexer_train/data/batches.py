"""Batches for the stock trainer: all query tokens of a batch come from one document."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from sentence_transformers.base.sampler import DefaultBatchSampler
from transformers import TrainerCallback

from data_gen.core.tensors import distinct
from data_gen.traces.labels import WindowOracle
from data_gen.traces.store import TraceDocument, TraceStore
from indexer_train import processes
from indexer_train.config import CandidatesConfig
from indexer_train.data.hard_negatives import HardNegatives
from indexer_train.data.sampling import as_tensor, columns_of, draw, generator, uniform, without

OPEN_DOCUMENTS = 32
"""Documents that stay open, each with its oracle unpacked (up to 256 MiB): memory must not grow with the store."""


def window_index(
    store: TraceStore, stride: int = 1, tails: bool = True, weights: dict[Path, float] | None = None
) -> Dataset:
    """One row per usable lookahead window: document, first row, one past its last row (int32), and its store's weight.

    stride: only windows that start at every n-th row; tails: also those shorter than tau; weights: how often an epoch
    reads a document of the store in that folder, 1 where nothing is said.
    """
    parts = []
    for number, document in enumerate(store):
        first, last = document.windows(serving=False).numpy().astype(np.int32).T
        kept = (first % stride == 0) & ((last - first == store.manifest.trace.window) | tails)
        own, weight = np.full(int(kept.sum()), number, np.int32), (weights or {}).get(document.root, 1.0)
        parts.append((own, first[kept], last[kept], np.full(len(own), weight)))
    columns = map(np.concatenate, zip(*parts, strict=True))
    table: Any = pa.table(dict(zip(("document", "first", "last", "weight"), columns, strict=True)))
    return Dataset(table, fingerprint=generate_random_fingerprint())  # else all of it is pickled to be hashed


class DocumentBatchSampler(DefaultBatchSampler):
    """Each epoch draws up to `batch_size` windows of every document, documents in random order.

    A document of weight w is drawn w times on average: documents of one weight share round(w * documents) draws (one
    at least), all of them once before any twice. What an epoch draws is a function of (seed, epoch) alone, so that a
    resumed run continues with the same batches. Several processes take the batches in turns; those that do not go round
    are left out, in every epoch others.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool = False, seed: int = 0, **_: Any) -> None:
        rows: Any = range(len(dataset))  # what the base class would draw from
        super().__init__(rows, batch_size=batch_size, drop_last=drop_last)
        self.windows = batch_size
        self.batch_size = None  # batches differ in size; with a number here, accelerate drops the smaller ones
        self.seed, self.epoch = seed, 0
        documents, weights = map(torch.tensor, columns_of(dataset, "document", "weight"))
        _, counts = documents.unique_consecutive(return_counts=True)  # a document's windows lie side by side
        self.groups = torch.arange(len(documents)).split(counts.tolist())
        self.weights: list[float] = weights[counts.cumsum(0) - counts].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Draw for that epoch from now on."""
        self.epoch = epoch

    def _draws(self) -> list[tuple[list[int], int]]:
        """(documents of one weight, how many batches an epoch takes of them)."""
        shared = {weight: [n for n, own in enumerate(self.weights) if own == weight] for weight in set(self.weights)}
        return [(shared[weight], max(1, round(weight * len(shared[weight])))) for weight in sorted(shared)]

    def __len__(self) -> int:
        drawn = sum(count for _, count in self._draws())
        return drawn - drawn % processes.count()

    def __iter__(self) -> Iterator[list[int]]:
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn: list[int] = []
        for documents, count in self._draws():
            while count > 0:
                order = torch.randperm(len(documents), generator=rng)[:count].tolist()
                drawn += [documents[place] for place in order]
                count -= len(order)
        for place in torch.randperm(len(drawn), generator=rng)[: len(self)].tolist():
            group = self.groups[drawn[place]]
            order = torch.randperm(len(group), generator=rng)[: self.windows]
            yield group[order].sort().values.tolist()


class Collator(ABC):
    """Rows of the index -> query features, document features and soft labels of one document.

    query_input_features [B, L, hidden]; query_positions [B]; query_most_golden: golden chunks of the window that has
    the most; document_input_values [N, L, ...] as stored;
    label [B, 5, N]: window mass, window peak, candidate mask, (in its first entry) the mass on protected chunks, and
    weight. epoch: the trainer's, see `TellEpoch`; processes that make batches ahead share it.
    """

    valid_label_columns = ("label",)

    def __init__(self, store: TraceStore, layers: list[int], golden: float, settings: CandidatesConfig) -> None:
        self.store, self.trace = store, store.manifest.trace
        self.paths = store.paths()
        self.layers, self.golden, self.settings = layers, golden, settings
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @cached_property
    def document(self) -> Callable[[int], TraceDocument]:
        """A document by its number."""
        return lru_cache(maxsize=OPEN_DOCUMENTS)(lambda number: self.store.document(self.paths[number]))

    @cached_property
    def common(self) -> Callable[[int], np.ndarray]:
        """A document's chunks [n] that are golden nearly everywhere, by its number."""
        return lru_cache(maxsize=OPEN_DOCUMENTS)(lambda number: self.document(number).oracle.common(self.golden))

    def __getstate__(self) -> dict[str, Any]:
        """All but what has been opened: the processes that make batches open documents of their own."""
        return {name: value for name, value in vars(self).items() if name not in ("document", "common")}

    @property
    def epoch(self) -> int:
        """The trainer's epoch, in every process that makes batches."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        number = rows[0]["document"]
        windows = torch.tensor([[row["first"], row["last"]] for row in rows])
        document, first = self.document(number), windows[:, 0]
        hidden = [document.hidden(layer).index_select(0, first) for layer in self.layers]
        candidates = self.candidates(number, windows)
        _, peak, candidate, _, _ = candidates["label"].unbind(dim=1)
        return {
            "query_input_features": torch.stack(hidden, dim=1),
            "query_positions": document.positions[first],
            "query_most_golden": int((candidate.bool() & (peak >= self.golden)).sum(dim=1).max()),
            "query_task": "query",
            "document_task": "document",
            **candidates,
        }

    @abstractmethod
    def candidates(self, number: int, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The document's keys and the label for windows [B, 2] of document `number`."""


class AllCandidates(Collator):
    """Every visible, unprotected chunk is compared."""

    def candidates(self, number: int, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        document = self.document(number)
        labels = document.labels(windows)
        protected = torch.zeros_like(labels.mass)
        protected[:, 0] = 1 - labels.mass.sum(dim=1) - labels.rest
        weight = torch.ones_like(labels.mass)
        if self.settings.common_weight != 1:
            common = torch.from_numpy(self.common(number))
            weight[:, common] = torch.where(labels.golden(self.golden)[:, common], self.settings.common_weight, 1.0)
        return {
            "document_input_values": torch.stack([document.keys(layer) for layer in self.layers], dim=1),
            "label": torch.stack([labels.mass, labels.peak, labels.candidate.float(), protected, weight], dim=1),
        }


class SampledCandidates(Collator):
    """The golden chunks of each token and drawn negatives; only their keys are read, each once.

    Instead of all N chunks the document has the U that any token of the batch compares (document_chunks [U], their
    numbers), and query_candidates [B, M] says which of them each token does. What is drawn is a function of (seed,
    epoch, document, tokens).
    """

    def __init__(
        self, store: TraceStore, layers: list[int], golden: float, settings: CandidatesConfig, seed: int
    ) -> None:
        super().__init__(store, layers, golden, settings)
        self.seed = seed
        self.hard = HardNegatives.beside(store) if settings.source == "hard" else None

    def candidates(self, number: int, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        document = self.document(number)
        rng = generator(self.seed, self.epoch, number, *windows.flatten().tolist())
        bounds = [self.trace.chunking.candidates(place) for place in document.positions[windows[:, 0]].tolist()]
        needed = document.oracle.windows(windows.numpy(), bounds)
        golden = [window.golden(self.golden) for window in needed]
        offered = self._offered(document, windows, golden)
        chosen = [self._choose(rng, *each) for each in zip(needed, golden, offered, strict=True)]
        table = np.zeros(document.chunks, np.int32)
        values = [window.at(chunks, table) for window, chunks in zip(needed, chosen, strict=True)]
        used, place = distinct(np.concatenate(chosen))
        used = used if len(used) else np.zeros(1, np.int64)  # no candidate anywhere: one key that the mask hides
        candidates = as_tensor(np.split(place, np.cumsum([len(chunks) for chunks in chosen])[:-1]))
        mass, peak = (as_tensor(list(column)) for column in zip(*values, strict=True))
        weights = as_tensor([np.ones(len(chunks), np.float32) for chunks in chosen])
        mask = weights.clone()
        if self.settings.common_weight != 1 and len(common := self.common(number)):
            everywhere = torch.from_numpy(np.isin(used, common))[candidates]
            weights[(peak >= self.golden) & everywhere] = self.settings.common_weight
        protected = torch.zeros_like(mask)
        protected[:, 0] = torch.tensor([window.protected_mass for window in needed])
        rows = torch.from_numpy(used)
        keys = [document.keys(layer).index_select(0, rows) for layer in self.layers]
        return {
            "query_candidates": candidates,
            "document_input_values": torch.stack(keys, dim=1),
            "document_chunks": rows,
            "label": torch.stack([mass, peak, mask, protected, weights], dim=1),
        }

    def _offered(self, document: TraceDocument, windows: torch.Tensor, golden: list[np.ndarray]) -> list[np.ndarray]:
        """Chunks that the source offers each window as negatives, before golden and invisible ones are taken out."""
        if self.settings.source == "in_batch":
            return [np.unique(np.concatenate(golden))] * len(golden)
        if self.hard is not None:
            return self.hard.of(document, windows[:, 0])
        return [np.empty(0, np.int64)] * len(golden)

    def _choose(
        self, rng: np.random.Generator, window: WindowOracle, golden: np.ndarray, offered: np.ndarray
    ) -> np.ndarray:
        """One token's candidates: positives, then negatives."""
        first, last = window.bounds
        positives = draw(rng, golden, self.settings.positives)
        count = self.settings.negatives * max(1, len(positives))
        pool = without(offered[(offered >= first) & (offered < last)], golden)
        negatives = draw(rng, pool, count)
        taken = np.union1d(golden, negatives) if len(negatives) else golden
        return np.concatenate([positives, negatives, uniform(rng, window.bounds, taken, count - len(negatives))])


class TellEpoch(TrainerCallback):
    """Tells the collator which epoch it draws for; the trainer itself tells the sampler only."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.collator.epoch = int(state.epoch)
