"""Batches made on the device that trains, from documents that stay in its memory.

The same labels, positives and distribution of negatives as on the host (indexer_train/data/batches.py), in tensor
operations that never wait for the device: all sizes are known on the host, once a document has been read. Sums are of
whole numbers and negatives are a function of (seed, epoch, document, token, chunk), so that a resumed run continues bit
for bit.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_gen.traces.device import DeviceOracle, sent_to
from data_gen.traces.labels import WindowLabels
from data_gen.traces.store import TraceDocument, TraceStore
from indexer_train.config import CandidatesConfig
from indexer_train.data.batches import Collator

HELD_BYTES = 8 << 30
"""Documents that stay on the device, at most, beside the newest one."""
NEVER = (1 << 63) - 1
"""Order of a chunk that must not be drawn."""
COUNTED = 1 << 24
"""Windows x chunks whose golden chunks are counted at once."""


@dataclass(frozen=True)
class HeldDocument:
    """One document. On the device: hidden [T, L, hidden], positions [T], keys [N, L, ...] as stored, its oracle, common
    [N] (golden nearly everywhere). On the host: golden [T], chunks of the window that starts at each row."""

    hidden: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    oracle: DeviceOracle
    common: torch.Tensor
    golden: np.ndarray

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(value.nbytes for value in vars(self).values()) - self.golden.nbytes


class DeviceCollator(Collator):
    """`AllCandidates` and `SampledCandidates`, on a device. Of the sources of negatives all but `hard`."""

    def __init__(
        self,
        store: TraceStore,
        layers: list[int],
        golden: float,
        settings: CandidatesConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(store, layers, golden, settings)
        self.seed, self.device = seed, device
        self.documents: OrderedDict[int, HeldDocument] = OrderedDict()

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        number = rows[0]["document"]
        windows = torch.tensor([[row["first"], row["last"]] for row in rows])
        held, first = self.held(number), windows[:, 0].numpy()
        tokens = sent_to(self.device, first)
        return {
            "query_input_features": held.hidden.index_select(0, tokens),
            "query_positions": held.positions.index_select(0, tokens),
            "query_most_golden": int(self._positives(held, first).max()),
            "query_task": "query",
            "document_task": "document",
            **self.candidates(number, windows),
        }

    def candidates(self, number: int, windows: torch.Tensor) -> dict[str, torch.Tensor]:
        held = self.held(number)
        labels = held.oracle.labels(windows)
        golden, protected = labels.golden(self.golden), 1 - labels.mass.sum(dim=1) - labels.rest
        if self.settings.kind == "all":
            label = self._label(labels, protected, held.common & golden)
            return {"document_input_values": held.keys, "label": label}
        rows = windows[:, 0].numpy()
        positives = self._positives(held, rows)
        negatives = self.settings.negatives * np.maximum(1, positives)
        wanted, unwanted, tokens = sent_to(self.device, np.stack([positives, negatives, rows]))
        order = shuffled(self._key(number), tokens, len(held.keys))
        if self.settings.source == "in_batch":  # what is golden for another token comes first
            order = order | (~golden.any(dim=0)).long() << 62
        drawn = [
            lowest(order, golden, wanted, int(positives.max())),
            lowest(order, labels.candidate & ~golden, unwanted, int(negatives.max())),
        ]
        chosen, there = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
        compared = WindowLabels(labels.mass.gather(1, chosen), labels.peak.gather(1, chosen), there, labels.rest)
        label = self._label(compared, protected, held.common[chosen] & golden.gather(1, chosen) & there)
        chunks, keys = torch.arange(len(held.keys), device=self.device), held.keys
        if chosen.numel() < len(keys):
            chunks, keys = chosen.flatten(), keys.index_select(0, chosen.flatten())
            chosen = torch.arange(len(chunks), device=self.device).view(chosen.shape)
        return {
            "query_candidates": chosen,
            "document_input_values": keys,
            "document_chunks": chunks,
            "label": label,
        }

    def held(self, number: int) -> HeldDocument:
        """A document by its number, brought to the device unless it is there."""
        if number not in self.documents:
            self.documents[number] = self._bring(self.document(number), self.common(number))
            while len(self.documents) > 1 and sum(each.nbytes for each in self.documents.values()) > HELD_BYTES:
                self.documents.popitem(last=False)
        self.documents.move_to_end(number)
        return self.documents[number]

    def _bring(self, document: TraceDocument, common: np.ndarray) -> HeldDocument:
        oracle = DeviceOracle(document.oracle, document.positions, self.trace.chunking, self.device)
        frequent = torch.zeros(document.chunks, dtype=torch.bool)
        frequent[torch.from_numpy(common)] = True
        golden, windows = np.zeros(len(document.positions), np.int64), document.windows(serving=False)
        for some in windows.split(max(1, COUNTED // document.chunks)):
            golden[some[:, 0]] = oracle.labels(some).golden(self.golden).sum(dim=1).cpu()
        return HeldDocument(
            hidden=torch.stack([document.hidden(layer) for layer in self.layers], dim=1).to(self.device),
            positions=document.positions.to(self.device),
            keys=torch.stack([document.keys(layer) for layer in self.layers], dim=1).to(self.device),
            oracle=oracle,
            common=frequent.to(self.device),
            golden=golden,
        )

    def _label(self, labels: WindowLabels, protected: torch.Tensor, frequent: torch.Tensor) -> torch.Tensor:
        """[W, 5, M] as `Collator` describes. frequent: [W, M] bool, golden here and nearly everywhere."""
        compared, first = labels.candidate, torch.zeros_like(labels.mass)
        first[:, 0] = protected
        weight = torch.where(frequent, self.settings.common_weight, 1.0)
        return torch.stack([labels.mass * compared, labels.peak * compared, compared.float(), first, weight], dim=1)

    def _positives(self, held: HeldDocument, rows: np.ndarray) -> np.ndarray:
        """Golden chunks that each window compares, [W]."""
        golden = held.golden[rows]
        return golden if self.settings.kind == "all" else np.minimum(golden, self.settings.positives)

    def _key(self, number: int) -> int:
        """What the random order of a document's chunks depends on, beside the token."""
        digest = hashlib.sha256(repr((self.seed, self.epoch, number)).encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)


def shuffled(key: int, rows: torch.Tensor, size: int) -> torch.Tensor:
    """A random number of 62 bits for each chunk of each token: a function of (key, row, chunk) alone, on any device.

    rows: [B] int64 -> [B, size] int64. The finaliser of SplitMix64 (Steele, Lea and Flood 2014), which maps different
    counters to different numbers, on a Weyl sequence that starts at `key`.
    """
    counter = rows[:, None] * size + torch.arange(size, device=rows.device)
    mixed = counter * _signed(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(mixed ^ _shifted(mixed, 31), 2)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 shifted right as if it had no sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def lowest(
    order: torch.Tensor, allowed: torch.Tensor, counts: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `counts` [B] allowed chunks that come first in each row's order: ([B, M] int64, [B, M] bool whether there is
    one), M = most, the largest of the counts, or all chunks. Nothing is drawn twice, and every choice is as likely."""
    found = torch.where(allowed, order, NEVER).topk(min(most, order.shape[1]), dim=1, largest=False)
    place = torch.arange(found.indices.shape[1], device=order.device)
    there = (place < counts[:, None]) & (found.values < NEVER)
    return found.indices * there, there
