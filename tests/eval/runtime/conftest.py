"""Faults that decoding must survive."""

import pytest
import torch


@pytest.fixture
def cannot_pin(monkeypatch):
    """A machine, with a GPU or without, that has no more memory to pin."""
    plain = torch.empty

    def empty(*sizes, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory\nand more lines")
        return plain(*sizes, **options)

    monkeypatch.setattr(torch, "empty", empty)
