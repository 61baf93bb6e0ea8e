"""An oracle in the memory of a device, pooled over lookahead windows there."""

import numpy as np
import torch

from data_gen.core.chunks import Chunking
from data_gen.traces.labels import SparseOracle, WindowLabels

FIXED = 1 << 40
"""Mass is added up in whole numbers of this part: in any order, on any device, the sum is the same."""


class DeviceOracle:
    """A document's oracle on `device`: the labels of `SparseOracle.labels`, made without a wait for the device.

    positions: [T] int64 of the document's query tokens.
    """

    def __init__(self, oracle: SparseOracle, positions: torch.Tensor, chunking: Chunking, device: torch.device) -> None:
        self.device, self.size, self.votes = device, oracle.size, oracle.votes
        self.chunks = torch.from_numpy(oracle.chunks).to(device)
        self.mass = torch.from_numpy((oracle.mass.astype(np.float64) * FIXED).round().astype(np.int64)).to(device)
        self.peak = torch.from_numpy(oracle.peak).to(device)
        self._pointers = oracle.pointers
        self._rest = np.append(0.0, oracle.rest.cumsum(dtype=np.float64))
        self._bounds = np.array([chunking.candidates(place) for place in positions.tolist()])

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.chunks.nbytes + self.mass.nbytes + self.peak.nbytes

    def labels(self, windows: torch.Tensor) -> WindowLabels:
        """What `windows` ([W, 2] rows, on the host) needed, on the device."""
        rows = windows.numpy()
        begin, end = self._pointers[rows].T
        tokens, stored = rows[:, 1] - rows[:, 0], end - begin
        shift = begin - (stored.cumsum() - stored)
        sent = sent_to(self.device, np.stack([shift, stored, tokens, *self._bounds[rows[:, 0]].T]))
        shifts, counts, lengths, first, last = sent
        total = int(stored.sum())
        owner = torch.arange(len(rows), device=self.device).repeat_interleave(counts, output_size=total)
        place = torch.arange(total, device=self.device) + shifts[owner]
        index = owner * self.size + self.chunks[place]
        mass = torch.zeros(len(rows) * self.size, dtype=torch.int64, device=self.device)
        mass = mass.index_add_(0, index, self.mass[place]).view(len(rows), self.size)
        peak = torch.zeros(len(rows) * self.size, device=self.device)
        peak = peak.scatter_reduce_(0, index, self.peak[place], "amax").view(len(rows), self.size)
        chunk = torch.arange(self.size, device=self.device)
        candidate = (chunk >= first[:, None]) & (chunk < last[:, None])
        whole = mass.sum(dim=1).clamp_min(FIXED) if self.votes else lengths * FIXED
        rest = (self._rest[rows[:, 1]] - self._rest[rows[:, 0]]) / tokens
        return WindowLabels(
            mass=(mass * candidate / whole[:, None].double()).float(),
            peak=peak * candidate,
            candidate=candidate,
            rest=sent_to(self.device, rest.astype(np.float32)),
        )


def sent_to(device: torch.device, values: np.ndarray) -> torch.Tensor:
    """Host values of any shape on a device, which is not waited for."""
    sent = torch.from_numpy(np.ascontiguousarray(values))
    return sent.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else sent.to(device)
