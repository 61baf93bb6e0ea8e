"""Demand fallback: a window that asks for more than the cap is read with full attention, and counted.

Some queries need nearly all of the history (MRCR: the n-th of many like notes). No resident set of a fixed size serves
them; an indexer with a calibrated threshold says so beforehand, because many chunks reach it.
"""

from typing import Literal

import torch
from pydantic import ConfigDict, Field

from data_gen.core.config import Strict
from data_gen.core.errors import InputError
from eval.serving.select import Resident
from indexer_train.selection import Budget, Threshold
from indexer_train.spec import IndexerSpec

Served = Literal["demand", "cap", "full"]
"""How a window was served: with what was asked for, with the best that the cap allows, or with everything."""


class Fallback(Strict):
    """full_above: a window whose demand exceeds this multiple of the cap gets full attention; up to it, the best chunks
    that the cap allows. Demand is what the bundle's threshold asks for beside the protected chunks."""

    model_config = ConfigDict(frozen=True)

    full_above: float = Field(1.0, ge=1)

    def check(self, spec: IndexerSpec, selection: Budget | Threshold) -> None:
        """Raise InputError where demand is not measured: the best so many are always as many."""
        if isinstance(selection, Budget):
            raise InputError(
                "fallback: the bundle serves a budget, which asks for as many chunks whatever is needed; calibrate a "
                "threshold (lookahead calibrate --recall 0.9) or pass one"
            )


def serve(
    resident: Resident, sequence: int, total: int, cap: int, protected: int, fallback: Fallback | None
) -> tuple[torch.Tensor, Served]:
    """(chunks to keep [R] ascending on the CPU, how). total: chunks made so far, `protected` of them protected."""
    asked = int(resident.demand[sequence]) + protected
    if asked <= cap:
        return resident.row(sequence).long().cpu(), "demand"
    if fallback is not None and asked > fallback.full_above * cap:
        return torch.arange(total), "full"
    return resident.row(sequence).long().cpu(), "cap"
