"""What the runtime asks of a model: read tokens, say what the indexer scores, keep exactly these chunks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from data_gen.traces.types import BackboneInfo
from eval.runtime.hosts.moving import Prepared
from eval.runtime.hosts.resident import Move


@dataclass(frozen=True)
class ResidentBytes:
    """Beside the model now. tensors: all layers of the resident chunks, as they lie; served: the same as a serving
    engine holds it (DeepSeek-V4: 584 + 132 bytes an entry; dense: without rows that stand for no chunk); keys: the
    memory indexer's keys of all chunks."""

    tensors: int
    served: int
    keys: int


class Host(Protocol):
    """A model and one batch of sequences of equal length that it decodes.

    cache: what the model's own `generate` takes as `past_key_values`; its `reset` forgets the sequences, its
    `reorder_cache` makes sequence i what another one was.
    """

    model: PreTrainedModel
    info: BackboneInfo
    cache: DynamicCache

    def attached(self) -> AbstractContextManager[None]:
        """The model may read into `cache` only while this is open."""
        ...

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read tokens [B, S]; returns the logits behind the last ones, [B, vocabulary]. InputError past the context."""
        ...

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based; -1 before any."""
        ...

    def hidden(self) -> torch.Tensor:
        """What enters the attention block of the indexer's layers at the newest token: [B, layers, hidden] bf16."""
        ...

    def keys(self) -> torch.Tensor:
        """Keys of all complete chunks as a trace holds them: [B, N, layers, width], fp16 or uint8."""
        ...

    def prepare(self, resident: Sequence[torch.Tensor]) -> Prepared:
        """Start fetching what is missing of a resident set, beside what is read next with the old one. InputError for
        another number of sequences, or ids that are not ascending complete chunks."""
        ...

    def keep(self, resident: Sequence[torch.Tensor] | Prepared) -> Move:
        """Make exactly these chunks resident: one [R] of ascending ids a sequence. Chunks made later join them, and
        those made since it was prepared. InputError as `prepare`; ValueError for a set prepared for rows that are
        gone."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk in all layers, as the cold side holds it."""
        ...

    def resident_bytes(self) -> ResidentBytes:
        """Summed over sequences."""
        ...
