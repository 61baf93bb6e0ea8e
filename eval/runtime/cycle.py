"""The decode cycle: a host's resident set is fixed every tau tokens, and what each window did is noted.

Who chooses is the caller's: `LSARuntime` asks Level 1; an evaluation may ask any policy. Both go through the same calls
of the host in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from data_gen.core.errors import InputError
from eval.runtime.hosts.base import Host
from eval.runtime.hosts.resident import Move, Prepared
from eval.serving.select import Served


@dataclass(frozen=True)
class Choice:
    """What should be resident after the newest token, not in force yet.

    resident: one [R] of ascending ids per sequence; demand: what the rule asked for beside the protected chunks;
    served: how, one word per sequence.
    """

    resident: Sequence[torch.Tensor]
    demand: list[int]
    served: list[Served]


@dataclass(frozen=True)
class Refresh:
    """One refresh of the resident set. position: the newest token read when the set was chosen; chunks: made by then;
    resident, fetched, evicted: chunks, summed over sequences, since the refresh before: what a new turn brought back is
    counted with its first; bytes: of the resident chunks beside the model when the set came into force; fetched_bytes:
    brought from the cold side; demand, served: as `Choice` says."""

    position: int
    chunks: int
    resident: int
    fetched: int
    evicted: int
    bytes: int
    fetched_bytes: int
    demand: list[int]
    served: list[Served]


class DecodeCycle:
    """Keeps a host's resident set, window after window.

    tau: tokens of a window; choose: what should be resident after the newest token; lag: tokens that are read with the
    old set after a new one was chosen. With 1 the fetch runs beside that token and needs memory of its own; with 0 it
    is waited for. A set chosen by `refresh` has no lag. first: tokens of the window that `refresh` begins, None: tau.
    windows: all refreshes so far. Raises InputError for another lag, and for a first window longer than the others.
    """

    def __init__(
        self, host: Host, tau: int, choose: Callable[[], Choice], lag: Literal[0, 1] = 0, first: int | None = None
    ) -> None:
        if lag not in (0, 1):
            raise InputError(f"lag: {lag}; give 0 (decoding waits for a fetch) or 1 (a fetch runs beside one token)")
        check_first(first, tau)
        self.host, self.tau, self.choose, self.lag, self.first = host, tau, choose, lag, first or tau
        self.reset()

    def reset(self) -> None:
        """Forget all windows; the host is reset by its cache."""
        self.windows: list[Refresh] = []
        self._tokens = self.tau  # of the window in force
        self._moves: list[Move] = []  # since the newest refresh
        self._coming: _Coming | None = None

    def refresh(self) -> Refresh:
        """Begin a first window: choose its resident set from the newest token read, and put it in force at once.

        Raises InputError before any is read.
        """
        self.arrive()
        self._tokens = self.first
        return self._renew()

    def advance(self) -> None:
        """To be called after every token read: puts a set in force that was on its way, and begins the next window
        when one is over."""
        self.arrive()
        if self.host.position - self.windows[-1].position < self._tokens:
            return
        self._tokens = self.tau
        if self.lag:
            chosen = self._chosen()
            self._coming = _Coming(chosen, self.host.prepare(chosen.choice.resident))
        else:
            self._renew()

    def arrive(self) -> None:
        """Put the set in force that is on its way, if one is."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            self._enforce(coming.chosen, coming.prepared)

    def keep_everything(self, sequences: int) -> None:
        """Bring back all chunks: what is read next is read with full attention. Does nothing before the first token."""
        if self.host.position >= 0:
            everything = torch.arange(self.host.cache.total)
            self._moves.append(self.host.keep([everything] * sequences))

    def _renew(self) -> Refresh:
        chosen = self._chosen()
        return self._enforce(chosen, chosen.choice.resident)

    def _chosen(self) -> "_Chosen":
        if self.host.position < 0:
            raise InputError("refresh: nothing was read yet; generate first")
        return _Chosen(self.host.position, self.host.cache.total, self.choose())

    def _enforce(self, chosen: "_Chosen", wanted: Sequence[torch.Tensor] | Prepared) -> Refresh:
        self._moves.append(self.host.keep(wanted))
        fetched, evicted = sum(move.fetched for move in self._moves), sum(move.evicted for move in self._moves)
        self._moves = []
        choice, held = chosen.choice, self.host.resident_bytes().tensors
        refresh = Refresh(
            chosen.position, chosen.chunks, sum(map(len, choice.resident)), fetched, evicted, held,
            fetched * self.host.cold_bytes, choice.demand, choice.served,
        )  # fmt: skip
        self.windows.append(refresh)
        return refresh


def check_first(first: int | None, tau: int) -> None:
    """Raise InputError for a first window of fewer tokens than one or more than tau."""
    if first is not None and not 1 <= first <= tau:
        raise InputError(f"first_window: {first}; a window has {tau} tokens, give 1 to {tau}")


@dataclass(frozen=True)
class _Chosen:
    """A choice, the newest position and the chunks made when it was taken."""

    position: int
    chunks: int
    choice: Choice


@dataclass(frozen=True)
class _Coming:
    """A choice whose missing chunks are on their way."""

    chosen: _Chosen
    prepared: Prepared
