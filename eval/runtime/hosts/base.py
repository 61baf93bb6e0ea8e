"""What the runtime asks of a model: read tokens, say what the indexer scores, keep exactly these chunks."""

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Self
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from data_gen.core.errors import InputError
from data_gen.traces.types import BackboneInfo
from eval.runtime.hosts.resident import Move, Prepared, ResidentChunks
from eval.serving.level1 import PagedKeys

_READERS_LOCK = threading.Lock()
_READERS: WeakKeyDictionary[PreTrainedModel, list[int]] = WeakKeyDictionary()
"""The threads that read a model whose rotary frequencies follow the length, once for each host at work."""


def rope_follows_length(model: PreTrainedModel) -> bool:
    """Whether a forward pass rewrites the model's rotary frequencies, as `dynamic` and `longrope` do."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return True
    return False


@dataclass(frozen=True)
class ResidentBytes:
    """Beside the model now. tensors: all layers of the resident chunks, as they are stored; served: the same as an
    engine holds it (DeepSeek-V4: 584 + 132 bytes an entry; dense: without rows that stand for no chunk); keys: the
    memory indexer's keys of all chunks; means: mean keys of the per-step correction."""

    tensors: int
    served: int
    keys: int
    means: int = 0


class Host(ABC):
    """A model and one batch of sequences of equal length that it decodes.

    layers: what the memory indexer reads, in its order; cache: what the model's own `generate` takes as
    `past_key_values`; its `reset` forgets the sequences, its `reorder_cache` makes sequence i what another one was.
    """

    model: PreTrainedModel
    info: BackboneInfo
    layers: list[int]
    cache: ResidentChunks
    one_thread: bool
    """Whether only one thread at a time may read the model (`rope_follows_length`)."""
    _reader: int | None = None
    """The thread that is attached."""

    def fork(self) -> Self:
        """An independent continuation of the same history."""
        twin = copy.copy(self)
        twin.cache, twin._reader = self.cache.fork(), None
        return twin

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model may read into `cache` only while this is open, in this thread; one inside another adds nothing.

        What reads into another cache, or into none, is left as it is: other hosts of the model, in this thread or in
        another one, and whatever else calls the model. Raises InputError where another thread reads with this host, or
        with a model that two threads cannot read at once (`rope_follows_length`).
        """
        thread = threading.get_ident()
        with _READERS_LOCK:
            if inside := self._reader is not None:
                if self._reader != thread:
                    raise InputError(
                        "another thread is reading with this host, which holds one batch of sequences: wait for it, or "
                        "open another host of the model"
                    )
            else:
                self._claim(thread)
        if inside:
            yield
            return
        try:
            with self.hooks():
                yield
        finally:
            with _READERS_LOCK:
                self._reader = None
                if self.one_thread:
                    _READERS[self.model].remove(thread)

    def _claim(self, thread: int) -> None:
        if self.one_thread:
            readers = _READERS.setdefault(self.model, [])
            if any(other != thread for other in readers):
                raise InputError(
                    f"{type(self.model).__name__} is being read in another thread, and its rotary frequencies depend "
                    "on the length of the text: use one thread at a time, or load the model once for each"
                )
            readers.append(thread)
        self._reader = thread

    @abstractmethod
    def hooks(self) -> AbstractContextManager[None]:
        """The hooks on the model by which `cache` is read into: held by `attached`, in one thread."""

    @abstractmethod
    def piece(self, sequences: int) -> int:
        """Tokens of each sequence to read at once, so that memory is bounded."""

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read tokens [B, S] with what is resident now; returns the logits after the last ones, [B, vocabulary].

        Raises InputError beyond the model's context.
        """
        if self.position + 1 + ids.shape[1] > self.info.context:
            raise InputError(
                f"{self.position + 1 + ids.shape[1]} tokens, the backbone's context is {self.info.context}"
            )
        with self.attached():
            while True:
                size = self.piece(len(ids))
                now, ids = ids[:, :size].to(self.model.device), ids[:, size:]
                logits = self.model(now, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
                if not ids.shape[1]:
                    return logits

    @property
    def position(self) -> int:
        """Position of the newest token read, 0-based; -1 before any."""
        return self.cache.get_seq_length() - 1

    def hidden(self) -> torch.Tensor:
        """What enters the attention block of the indexer's layers at the newest token: [B, layers, hidden] bf16."""
        return torch.stack([self.cache.newest[layer].to(self.model.device) for layer in self.layers], dim=1)

    @abstractmethod
    def keys(self) -> torch.Tensor:
        """Keys of all complete chunks as a trace holds them: [B, N, layers, width], fp16 or uint8."""

    def level1_keys(self) -> PagedKeys | torch.Tensor:
        """The same as Level 1 scores them: rows [B, N, layers, width], or pages where keys are fp8."""
        return self.keys()

    def prepare(self, resident: Sequence[torch.Tensor]) -> Prepared:
        """Start fetching what is missing of a resident set, beside what is read next with the old one.

        resident: one [R] of ascending ids a sequence. Raises InputError for another number of sequences, or ids that
        are not ascending complete chunks.
        """
        return self.cache.prepare(resident)

    def keep(self, resident: Sequence[torch.Tensor] | Prepared) -> Move:
        """Make exactly these chunks resident: one [R] of ascending ids per sequence. Chunks made later join them, and
        those made since it was prepared. InputError as `prepare`; ValueError for a set prepared for rows that are
        gone."""
        return self.cache.keep(resident)

    @property
    def cold_bytes(self) -> int:
        """Bytes of one chunk in all layers, as the cold side holds it."""
        return self.cache.cold.unit_bytes

    @abstractmethod
    def resident_bytes(self) -> ResidentBytes:
        """Summed over sequences."""
