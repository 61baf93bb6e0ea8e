"""Level 2's selection in Triton: the k best of a list of scores without a sort, one program a sequence.

The list is read as interleaved columns, four or eight a thread. The k-th largest of the column maxima is a lower
bound of the k-th largest score, and in a list without structure few scores lie above it: for 512 of 24,576 about 700.
They are collected, and the k-th largest among them is found digit by digit, by histograms of 256 counts. Where more
scores than fit lie above the bound, the digits are counted over the whole list: slower, and as exact.
"""

import torch
import triton
import triton.language as tl

from data_gen.errors import InputError

FEWEST, MOST = 16, 2048
"""Columns: twice as many as are wanted, so that the bound leaves few scores above it."""
STEP = 8
"""Rows of the columns that are read at once; a kernel is compiled for every multiple of it."""
NOTHING = tl.constexpr(0x007FFFFF)
"""What -inf becomes as an ordered number."""


def select_resident(scores: torch.Tensor, slots: torch.Tensor, k: int) -> torch.Tensor:
    """The slots of the k best scores of each sequence, then -1: [B, R] fp32, [B, R] int32 -> [B, k] int32.

    The set is that of `eval.decode.level2.select_resident`; of equal scores at the cut it is always the same ones, not
    always the first; the order is the columns'. NaN is not found here. Raises InputError on other layouts and k.
    """
    columns = max(FEWEST, 2 * triton.next_power_of_2(k))
    if not 1 <= k <= MOST // 2:
        raise InputError(f"kernels.topk: the best {k}; the kernel selects 1 to {MOST // 2}")
    if scores.dtype != torch.float32 or slots.dtype != torch.int32 or scores.shape != slots.shape:
        raise InputError(
            f"kernels.topk: {scores.dtype} scores and {slots.dtype} slots; need fp32 and int32 of one shape"
        )
    batch, listed = scores.shape
    best = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    kept = torch.empty(batch, columns, dtype=torch.int32, device=scores.device)
    depth = max(1, triton.cdiv(triton.cdiv(listed, columns), STEP)) * STEP
    _select[(batch,)](
        scores.contiguous(), slots.contiguous(), kept, best, listed, k,
        COLUMNS=columns, DEPTH=depth, STEP=STEP, num_warps=max(1, min(8, columns // 128)),
    )  # fmt: skip
    return best


@triton.jit(do_not_specialize=["k"])  # it changes on the way: a constant 1 must not take its place
def _select(
    scores,  # [B, listed] fp32
    slots,  # [B, listed] int32
    kept,  # [B, COLUMNS] int32, scratch
    best,  # [B, k] int32
    listed,
    k,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,  # scores of a column, a multiple of STEP; with COLUMNS they cover the list
    STEP: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    scores += sequence * listed
    slots += sequence * listed
    kept += sequence * COLUMNS
    best += sequence * k
    column = tl.arange(0, COLUMNS)

    largest = tl.zeros([COLUMNS], tl.uint32)
    for first in range(0, DEPTH, STEP):
        for row in tl.static_range(STEP):
            largest = tl.maximum(largest, _ordered(scores, (first + row) * COLUMNS + column, listed))
    cut, ties = _kth_largest(largest, k)
    cut = tl.maximum(cut, NOTHING)
    above, _ = _count(scores, listed, cut, COLUMNS, DEPTH, STEP)
    found = tl.sum(above)
    ties = k - found
    if found >= k:
        if found <= COLUMNS:
            place = tl.cumsum(above) - above
            for first in range(0, DEPTH, STEP):
                for row in tl.static_range(STEP):
                    key = _ordered(scores, (first + row) * COLUMNS + column, listed)
                    tl.store(kept + place, key.to(tl.int32, bitcast=True), mask=key > cut)
                    place += (key > cut).to(tl.int32)
            tl.debug_barrier()  # others' stores are read
            few = tl.load(kept + column, mask=column < found, other=0).to(tl.uint32, bitcast=True)
            cut, ties = _kth_largest(few, k)
        else:
            cut, ties = _kth_largest_of_all(scores, listed, k, COLUMNS, DEPTH)

    above, equal = _count(scores, listed, cut, COLUMNS, DEPTH, STEP)
    ties = tl.where(cut > NOTHING, ties, 0)
    left = tl.minimum(tl.maximum(ties - (tl.cumsum(equal) - equal), 0), equal)  # ties that a column may take
    place = tl.cumsum(above + left) - (above + left)
    taken = tl.sum(above + left)
    for first in range(0, DEPTH, STEP):
        for row in tl.static_range(STEP):
            at = (first + row) * COLUMNS + column
            key = _ordered(scores, at, listed)
            tie = (key == cut) & (left > 0)
            take = (key > cut) | tie
            tl.store(kept + place, at, mask=take)
            place += take.to(tl.int32)
            left -= tie.to(tl.int32)
    tl.debug_barrier()
    at = tl.load(kept + column, mask=column < taken, other=0)
    slot = tl.load(slots + at, mask=column < taken, other=-1)
    tl.store(best + column, slot, mask=column < k)


@triton.jit
def _count(scores, listed, cut, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEP: tl.constexpr):
    """Scores (above, at) the cut in each column."""
    above = tl.zeros([COLUMNS], tl.int32)
    equal = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, DEPTH, STEP):
        for row in tl.static_range(STEP):
            key = _ordered(scores, (first + row) * COLUMNS + tl.arange(0, COLUMNS), listed)
            above += (key > cut).to(tl.int32)
            equal += (key == cut).to(tl.int32)
    return above, equal


@triton.jit
def _ordered(scores, at, listed):
    """Scores as uint32 in the same order: 0 beyond the list, NOTHING for -inf, one value for both zeros."""
    score = tl.load(scores + at, mask=at < listed, other=-float("inf"))
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(at < listed, key, 0)


@triton.jit
def _kth_largest(keys, k):
    """(the k-th largest of a tile of uint32, how many of its equals belong to the k largest)."""
    cut = tl.zeros([], tl.uint32)
    counted = keys >= 0
    for digit in range(4):
        shift = 24 - 8 * digit
        byte = (keys >> shift) & 0xFF
        chosen, k = _digit(tl.histogram(byte.to(tl.int32), 256, mask=counted), k)
        counted = counted & (byte == chosen)
        cut = (cut << 8) | chosen
    return cut, k


@triton.jit
def _kth_largest_of_all(scores, listed, k, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """`_kth_largest` of the whole list, read once a digit."""
    cut = tl.zeros([], tl.uint32)
    known = tl.zeros([], tl.uint32)
    for digit in range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros([256], tl.int32)
        for row in range(DEPTH):
            key = _ordered(scores, row * COLUMNS + tl.arange(0, COLUMNS), listed)
            byte = (key >> shift) & 0xFF
            counts += tl.histogram(byte.to(tl.int32), 256, mask=(key & known) == cut)
        chosen, k = _digit(counts, k)
        cut |= chosen << shift
        known |= tl.full([], 0xFF, tl.uint32) << shift
    return cut, k


@triton.jit
def _digit(counts, k):
    """(digit of the k-th largest, its rank among those with this digit), from counts by digit."""
    at_least = tl.cumsum(counts, reverse=True)
    chosen = tl.sum((at_least >= k).to(tl.int32)) - 1
    above = tl.sum(tl.where(tl.arange(0, 256) > chosen, counts, 0))
    return chosen.to(tl.uint32), k - above
