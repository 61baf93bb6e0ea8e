"""Level 1: score a history's chunks with the memory indexer and say which must be resident for the next tau tokens.

Needs keys and hidden states, no model and no Hugging Face. Called by the runtime around a Hugging Face model
(eval/runtime/runtime.py) and by serving engines, with their own key pool.

    level1 = open_level1(load_scorer(folder), Limits(cap=24_576))
    queries = level1.pack(hidden, positions)  # hidden [B, L, hidden]: what the indexer's layers read
    resident = level1.resident(queries, PagedKeys(pages, table))
"""

from typing import Literal, get_args

from data_gen.core.errors import InputError
from eval.serving.kernels.device import lacks, warn_once
from eval.serving.level1_torch import Indexer, Level1, PagedKeys
from eval.serving.select import Limits
from indexer_train.selection import Selection

__all__ = ["Backend", "Indexer", "Level1", "PagedKeys", "open_level1"]

Backend = Literal["auto", "torch", "triton", "triton-fp8"]


def open_level1(
    indexer: Indexer,
    limits: Limits,
    selection: Selection | None = None,
    backend: Backend = "auto",
) -> Level1:
    """Level 1 on the indexer's device; `auto`: Triton on a GPU where it is installed and has all that the bundle needs,
    else torch, and a warning is logged that says why.

    triton-fp8 rounds queries to fp8 as well: faster, but the set comes out a little different, so only on request.
    Raises InputError when Triton is asked for and is not installed, has no GPU of compute capability 8.9, or lacks a
    term of the bundle or its rule.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend: {backend} is not one of {', '.join(get_args(Backend))}")
    level1, lacking = Level1(indexer, limits, selection), lacks(indexer.device)
    # Without a GPU torch is what `auto` means; on one it is second best, and said.
    if backend == "torch" or (backend == "auto" and lacking and indexer.device.type != "cuda"):
        return level1
    try:
        if lacking:
            raise InputError(f"backend: {backend} needs {lacking}; use the torch backend")
        from eval.serving.level1_triton import TritonLevel1

        return TritonLevel1(indexer, limits, selection, fp8=backend == "triton-fp8")
    except InputError as error:
        if backend != "auto":
            raise
        warn_once(f"Level 1 is computed by torch, not by Triton: {error}")
    return level1
