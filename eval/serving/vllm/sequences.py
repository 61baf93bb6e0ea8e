"""Which sequences are being decoded, what each may read, and when that was chosen: no engine, no tensors of keys."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Chosen:
    """A resident set. position: the newest token read when it was chosen; chunks: complete then; resident: those of
    them to read, [R] int64 on the CPU, ascending; blocks: [R] int32, the block of each that the engine's table does not
    know, else -1. Chunks that are made later are read too."""

    position: int
    chunks: int
    resident: torch.Tensor
    blocks: torch.Tensor | None = None

    @property
    def left_out(self) -> int:
        """Chunks that are not read."""
        return self.chunks - len(self.resident)


NOTHING = Chosen(-1, 0, torch.empty(0, dtype=torch.int64))
"""The set of a row that no request has: a CUDA graph's padding."""


@dataclass
class Sequence:
    """position: its newest token read; force: the set in force, None while everything may be read; coming: one that
    comes into force with the next token but one (lag 1); newest: [L, hidden] bf16, what entered the attention blocks
    of the indexer's layers at `position`, where a set is due after it; reads: blocks it read last under a set."""

    position: int = -1
    force: Chosen | None = None
    coming: Chosen | None = None
    newest: torch.Tensor | None = None
    reads: int = 0

    def due(self, window: int) -> bool:
        """Is a set to be chosen after the newest token?"""
        latest = self.coming or self.force
        return latest is None or self.position - latest.position >= window

    def restart(self) -> None:
        """Read with full attention again: a prompt, or all of it after a preemption."""
        self.force = self.coming = self.newest = None
        self.reads = 0

    def begin(self, position: int) -> None:
        """Before token `position` is read alone: a set that was on its way is in force; a gap starts again."""
        if self.position != position - 1:
            self.restart()
        if self.coming is not None:
            self.force, self.coming = self.coming, None

    def choose(self, chosen: Chosen, lag: int) -> None:
        """A new set: in force at once, but one token later where another one still serves."""
        if lag and self.force is not None:
            self.coming = chosen
        else:
            self.force = chosen
        self.newest = None


@dataclass
class Counters:
    """Since the start. refreshes: sets chosen; capped, full: of them, those that asked for more than the cap and got
    the best it allows, or everything; rows: tokens read with a set; read, made: their blocks, and what full attention
    would have read."""

    refreshes: int = 0
    capped: int = 0
    full: int = 0
    rows: int = 0
    read: int = 0
    made: int = 0


@dataclass
class Sequences:
    """All sequences of one engine process, by the engine's name for the request."""

    held: dict[str, Sequence] = field(default_factory=dict)

    def enter(self, name: str, position: int, alone: bool) -> Sequence:
        """The sequence whose token `position` is about to be read, the last of several unless `alone`."""
        sequence = self.held.get(name)
        if sequence is None:
            sequence = self.held[name] = Sequence()
        if alone:
            sequence.begin(position)
        else:
            sequence.restart()
        return sequence
