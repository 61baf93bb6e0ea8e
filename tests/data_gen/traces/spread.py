"""An oracle spread out over all chunks, token by token: the truth that pooling is compared with."""

import torch

from data_gen.traces.labels import SparseOracle


def spread(oracle: SparseOracle) -> tuple[torch.Tensor, torch.Tensor]:
    """(mass, peak), each [T, size] fp32; zero where nothing was stored."""
    mass, peak = torch.zeros(2, len(oracle.rest), oracle.size)
    for row in range(len(oracle.rest)):
        for place in range(oracle.pointers[row], oracle.pointers[row + 1]):
            mass[row, oracle.chunks[place]] = float(oracle.mass[place])
            peak[row, oracle.chunks[place]] = float(oracle.peak[place])
    return mass, peak
