"""Level 2's selection: the k best of a list of scores without a sort, one block or program per sequence.

Lists that fit in a block's registers are selected from by topk.cu where it can be compiled, others in Triton. There any
cut with k to COLUMNS scores above it will do: those scores are collected, and the k-th largest among them is found
digit by digit, by histograms of 256 counts. The list is read as interleaved columns, twice as many as wanted scores:
about 0.7 COLUMNS scores lie above the median of the column maxima, whatever their distribution. So the first cut is a
little below the maxima's mean, and it is usually the last. Bisection follows. Where it finds no cut, because too many
scores are equal, it ends at the k-th largest itself.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from data_gen.core.errors import InputError
from eval.serving.kernels import nvrtc

BLOCK, LISTED = 1024, 24 * 1024
"""Threads of a block of topk.cu, and the longest list that they hold."""
FEWEST, MOST = 16, 2048
"""Columns: twice as many as are wanted, four or eight a thread."""
TILE = 8192
"""Scores that are read at once, in 8 rows of the columns at most; a kernel is compiled for every number of them."""
LOWEST = tl.constexpr(0x007FFFFF)
"""-inf as an ordered number."""


def select_resident(scores: torch.Tensor, slots: torch.Tensor, k: int) -> torch.Tensor:
    """The slots of the k best scores of each sequence, then -1: [B, R] fp32, [B, R] int32 -> [B, k] int32.

    The set is that of `eval.serving.level2.select_resident`; of equal scores at the cut it is always the same ones, not
    always the first, in no particular order. NaN is not found here. Raises InputError on other layouts and k.
    """
    if not 1 <= k <= MOST // 2:
        raise InputError(f"kernels.topk: the best {k}; the kernel selects 1 to {MOST // 2}")
    if scores.dtype != torch.float32 or slots.dtype != torch.int32 or scores.shape != slots.shape:
        raise InputError(
            f"kernels.topk: {scores.dtype} scores and {slots.dtype} slots; need fp32 and int32 of one shape"
        )
    batch, listed = scores.shape
    scores, slots = scores.contiguous(), slots.contiguous()
    best = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    if listed <= LISTED and nvrtc.has_nvrtc(scores.device):
        nvrtc.kernel("topk.cu", "select_kernel", scores.device)(batch, BLOCK, scores, slots, best, listed, k)
        return best
    columns = max(FEWEST, 2 * triton.next_power_of_2(k))
    kept = torch.empty(batch, 2, columns, dtype=torch.int32, device=scores.device)
    rows = min(8, TILE // columns)
    steps = max(1, triton.cdiv(listed, columns * rows))
    warps = max(1, min(8, columns // 128))
    # without maxnreg the compiler saves registers, and spills
    _select[(batch,)](
        scores, slots, kept, best, listed, k,
        COLUMNS=columns, STEPS=steps, STEP=rows, num_warps=warps, maxnreg=255,
    )  # fmt: skip
    return best


@triton.jit(do_not_specialize=["k"])  # it changes on the way: a constant 1 must not take its place
def _select(
    scores,  # [B, listed] fp32
    slots,  # [B, listed] int32
    kept,  # [B, 2, COLUMNS] int32, scratch: scores above the cut, their places
    best,  # [B, k] int32
    listed,
    k,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,  # STEPS * STEP * COLUMNS cover the list
    STEP: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    scores += sequence * listed
    slots += sequence * listed
    kept += sequence * (2 * COLUMNS)
    best += sequence * k
    column = tl.arange(0, COLUMNS)

    largest = tl.full([COLUMNS], -float("inf"), tl.float32)
    present = tl.zeros([COLUMNS], tl.int32)
    for step in range(STEPS):
        tile, _ = _rows(scores, step, listed, COLUMNS, STEP)
        largest = tl.maximum(largest, tl.max(tile, axis=0))
        present += tl.sum((tile > -float("inf")).to(tl.int32), axis=0)
    filled = largest > -float("inf")
    columns = tl.maximum(tl.sum(filled.to(tl.int32)), 1)
    mean = tl.sum(tl.where(filled, largest, 0.0)) / columns
    spread = tl.sqrt(tl.sum(tl.where(filled, (largest - mean) * (largest - mean), 0.0)) / columns)

    low = tl.maximum(_ordered(tl.min(largest)), LOWEST + 1) - 1  # k scores or more are above it
    high = _ordered(tl.max(largest))  # and fewer above this
    cut = tl.minimum(tl.maximum(_ordered(mean - spread / 4), low), high)
    above = _above(scores, cut, listed, COLUMNS, STEPS, STEP)
    found = tl.sum(above)
    # With k scores or fewer a column is empty (there are 2 k columns), so `low` is -inf: all that is above it is taken.
    searching = tl.sum(present) > k
    last = tl.where(searching, high, low)
    # Above `low` there are always k scores or more, above `high` fewer. Either a cut between them leaves as many as the
    # columns hold, or the two become neighbours: then more scores than that equal `high`, which is the k-th largest.
    while searching & ((found < k) | (found > COLUMNS)):
        low = tl.where(found > COLUMNS, cut, low)
        high = tl.where(found > COLUMNS, high, cut)
        cut = low + (high - low) // 2
        searching = high - low > 1
        last = high
        above = _above(scores, cut, listed, COLUMNS, STEPS, STEP)
        found = tl.sum(above)
    if searching:
        start = tl.cumsum(above) - above
        for step in range(2 * STEPS):
            tile, at = _rows(scores, step, listed, COLUMNS, STEP // 2)
            take = tile > _score(cut)
            taken = tl.cumsum(take.to(tl.int32), axis=0)
            place = start[None, :] + taken - 1
            tl.store(kept + place, _ordered(tile).to(tl.int32, bitcast=True), mask=take)
            tl.store(kept + COLUMNS + place, at, mask=take)
            start += tl.sum(take.to(tl.int32), axis=0)
        tl.debug_barrier()  # others' stores are read
        few = column < found
        key = tl.load(kept + column, mask=few, other=0).to(tl.uint32, bitcast=True)
        slot = tl.load(slots + tl.load(kept + COLUMNS + column, mask=few, other=0), mask=few, other=-1)
        # Counted from the cut the numbers are small: their upper digits are zero, and are not counted.
        last, ties = _kth_largest(tl.where(few, key - cut, 0), k)
        equal = (key == last + cut) & few
        take = ((key > last + cut) & few) | (equal & (tl.cumsum(equal.to(tl.int32)) <= ties))
        tl.store(best + tl.cumsum(take.to(tl.int32)) - 1, slot, mask=take)
    else:
        _take(scores, slots, best, _score(last), listed, k, COLUMNS, STEPS, STEP)


@triton.jit
def _rows(scores, step, listed, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """STEP rows of the columns, -inf beyond the list, and their places in it: [STEP, COLUMNS]."""
    at = (step * STEP + tl.arange(0, STEP)[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(scores + at, mask=at < listed, other=-float("inf")), at


@triton.jit
def _above(scores, cut, listed, COLUMNS: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr):
    """Scores above an ordered number in each column."""
    above = tl.zeros([COLUMNS], tl.int32)
    for step in range(STEPS):
        tile, _ = _rows(scores, step, listed, COLUMNS, STEP)
        above += tl.sum((tile > _score(cut)).to(tl.int32), axis=0)
    return above


@triton.jit
def _take(
    scores, slots, best, last, listed, k, COLUMNS: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Everything above `last`, and as many of its equals as are wanted, out of the whole list; then -1."""
    above = tl.zeros([COLUMNS], tl.int32)
    equal = tl.zeros([COLUMNS], tl.int32)
    for step in range(STEPS):
        tile, _ = _rows(scores, step, listed, COLUMNS, STEP)
        above += tl.sum((tile > last).to(tl.int32), axis=0)
        equal += tl.sum((tile == last).to(tl.int32), axis=0)
    ties = tl.where(last > -float("inf"), k - tl.sum(above), 0)
    left = tl.minimum(tl.maximum(ties - (tl.cumsum(equal) - equal), 0), equal)  # what a column may take of them
    start = tl.cumsum(above + left) - (above + left)
    count = tl.sum(above + left)
    for step in range(2 * STEPS):
        tile, at = _rows(scores, step, listed, COLUMNS, STEP // 2)
        tie = (tile == last) & (tl.cumsum((tile == last).to(tl.int32), axis=0) <= left[None, :])
        take = (tile > last) | tie
        place = start[None, :] + tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(best + place, tl.load(slots + at, mask=take, other=-1), mask=take)
        left -= tl.sum(tie.to(tl.int32), axis=0)
        start += tl.sum(take.to(tl.int32), axis=0)
    column = tl.arange(0, COLUMNS)
    tl.store(best + column, -1, mask=(column >= count) & (column < k))


@triton.jit
def _ordered(score):
    """fp32 -> uint32 in the same order, both zeros one."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _score(ordered):
    """uint32 -> fp32, the inverse of _ordered."""
    bits = tl.where(ordered >> 31 != 0, ordered ^ 0x80000000, ordered ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(keys, k):
    """(the k-th largest of a tile of uint32, how many of its equals belong to the k largest)."""
    cut = tl.zeros([], tl.uint32)
    counted = keys >= 0
    largest = tl.max(keys)
    for digit in range(4):
        shift = 24 - 8 * digit
        if largest >> shift != 0:  # else this digit is 0 everywhere
            byte = (keys >> shift) & 0xFF
            counts = tl.histogram(byte.to(tl.int32), 256, mask=counted)
            at_least = tl.cumsum(counts, reverse=True)
            chosen = tl.sum((at_least >= k).to(tl.int32)) - 1
            k -= tl.sum(tl.where(tl.arange(0, 256) > chosen, counts, 0))
            counted = counted & (byte == chosen)
            cut += chosen.to(tl.uint32) << shift
    return cut, k
