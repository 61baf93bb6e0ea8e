"""Level 1's second launch: floor, cap and budget, where the threshold alone chose too few or too many.

In the ordinary case it only fills up the row of ids. Otherwise it finds the score of the last chunk to keep by counting
its four bytes, one after the other, and writes the ids again: no sort. The programs of a sequence share the scores and
meet between the steps: each waits for all others, so the launch is cooperative, of no more programs than the device
runs at once, one a multiprocessor. Where programs run one after the other (the interpreter), each step is a launch of
its own.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

STEPS = tl.constexpr(6)
"""Four bytes, the count of what each program keeps, the ids."""
SCRATCH = tl.constexpr(4 * 256 + 1)
"""Integers a sequence that must be zero: the counts of four bytes, and the gate where programs meet."""


@triton.jit
def limit_kernel(
    positions,  # [B] fp32 with a stride: the last column of the packed queries
    position_stride,
    scores,  # [B, N] fp32
    chunks,  # N
    found,  # [B] int32: the threshold's count, or -1
    scratch,  # [B, SCRATCH] int32
    shares,  # [B, programs, 2] int32: chunks that a program keeps for certain, and ties with the last one to keep
    status,  # [B, STATUS] int32, set to zero for the next call
    ids,  # [B, cap] int32
    counts,  # [B] int32
    demand,  # [B] int32
    budget,  # [1] fp64
    floor,
    cap,
    BUDGET: tl.constexpr,
    TOKENS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    STATUS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,  # programs of a sequence, rounded up to a power of two
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Grid (programs, B); steps FIRST .. LAST - 1 of STEPS."""
    part, parts, sequence = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    count = tl.load(found + sequence)
    visible = (tl.load(positions + sequence * position_stride).to(tl.int32) + 1) // TOKENS
    visible = tl.where(count < 0, 0, visible)  # the table is too short: nothing was scored
    candidates = tl.maximum(visible - RECENT - SINK, 0)
    protected = visible - candidates
    if BUDGET:
        asked = tl.minimum(tl.maximum((tl.load(budget) * visible).to(tl.int32), 1), candidates)
    else:
        asked = tl.maximum(count, 0) - protected
    kept = tl.minimum(tl.maximum(asked, floor - protected), tl.minimum(cap - protected, candidates))
    row = ids + sequence * cap
    if BUDGET or kept != asked:  # else the ids that the threshold chose stand, and only their row is filled up
        pages = tl.cdiv(visible, 64)
        first, last = (part * pages) // parts * 64, ((part + 1) * pages) // parts * 64
        line, digits = scores + sequence * chunks, scratch + sequence * SCRATCH
        share = shares + sequence * parts * 2
        for step in range(FIRST, LAST):
            if step < 4:
                count_digits(line, digits, step, first, last, visible, kept, SINK, RECENT, TILE)
            elif step == 4:
                count_kept(line, digits, share + part * 2, first, last, visible, kept, SINK, RECENT, TILE)
            else:
                write_kept(line, digits, share, row, part, first, last, visible, kept, SINK, RECENT, TILE, PARTS)
            if step + 1 < LAST:
                meet(digits + SCRATCH - 1, (step + 1 - FIRST) * parts)
    if LAST == STEPS:
        for start in range(protected + kept + part * TILE, cap, parts * TILE):
            at = start + tl.arange(0, TILE)
            tl.store(row + at, tl.full([TILE], -1, tl.int32), mask=at < cap)
        if part == 0:
            tl.store(demand + sequence, asked)
            tl.store(counts + sequence, tl.where(count < 0, -1, protected + kept))
            for start in range(0, STATUS, TILE):
                at = start + tl.arange(0, TILE)
                tl.store(status + sequence * STATUS + at, tl.zeros([TILE], tl.int32), mask=at < STATUS)


@triton.jit
def meet(gate, arrivals):
    """Wait until `arrivals` programs have come; what they wrote before is seen after."""
    tl.debug_barrier()
    arrived = tl.atomic_add(gate, 1, sem="acq_rel") + 1
    while arrived < arrivals:
        arrived = tl.atomic_add(gate, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def ranks(scores, at, last, visible, SINK: tl.constexpr, RECENT: tl.constexpr):
    """The scores as integers from 0 to 2^32 - 1 that sort like them, -0 and 0 alike, and which chunks compete."""
    score = tl.load(scores + at, mask=at < last, other=0.0)
    # The bits of a float sort like the float, but backwards below zero: there all bits but the sign are turned over.
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return rank, (at < last) & (at >= SINK) & (at < visible - RECENT)


@triton.jit
def leading(digits, steps, kept):
    """The first `steps` bytes of the last chunk's rank, and how many chunks with these bytes are to be kept."""
    digit = tl.arange(0, 256)
    # Of the ranks that share the bytes so far, the next byte is the largest that `missing` of them reach. Every program
    # works it out for itself from the shared counts, which others wrote: hence `volatile`.
    prefix, missing = tl.zeros([], tl.int64), kept
    for step in range(steps):
        alike = tl.load(digits + step * 256 + digit, volatile=True)
        found = tl.sum((tl.cumsum(alike, reverse=True) >= missing).to(tl.int32)) - 1
        missing -= tl.sum(tl.where(digit > found, alike, 0))
        prefix = prefix * 256 + found
    return prefix, missing


@triton.jit
def count_digits(
    scores, digits, step, first, last, visible, kept, SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr
):
    """Count byte `step` of the ranks that share the bytes found so far."""
    prefix, _ = leading(digits, step, kept)
    histogram = tl.zeros([256], tl.int32)
    for start in range(first, last, TILE):
        rank, candidate = ranks(scores, start + tl.arange(0, TILE), last, visible, SINK, RECENT)
        alike = candidate & ((rank >> (32 - 8 * step)) == prefix)
        histogram += tl.histogram(((rank >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=alike)
    tl.atomic_add(digits + step * 256 + tl.arange(0, 256), histogram, mask=histogram > 0)


@triton.jit
def count_kept(
    scores, digits, share, first, last, visible, kept, SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr
):
    """Store how many chunks of the run are protected or better than the last one, and how many tie with it."""
    rank_of_last, _ = leading(digits, 4, kept)
    certain, ties = 0, 0
    for start in range(first, last, TILE):
        at = start + tl.arange(0, TILE)
        rank, candidate = ranks(scores, at, last, visible, SINK, RECENT)
        better = (at < last) & (at < visible) & (~candidate | (rank > rank_of_last))
        certain += tl.sum(better.to(tl.int32))
        ties += tl.sum((candidate & (rank == rank_of_last)).to(tl.int32))
    tl.store(share, certain)
    tl.store(share + 1, ties)


@triton.jit
def write_kept(
    scores, digits, shares, ids, part, first, last, visible, kept,
    SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the run's ids after those of the runs before; of the ties the oldest."""
    rank_of_last, missing = leading(digits, 4, kept)
    other = tl.arange(0, PARTS)
    certain = tl.load(shares + other * 2, mask=other < part, other=0, volatile=True)
    ties = tl.sum(tl.load(shares + other * 2 + 1, mask=other < part, other=0, volatile=True))
    base = tl.sum(certain) + tl.minimum(ties, missing)
    for start in range(first, last, TILE):
        at = start + tl.arange(0, TILE)
        rank, candidate = ranks(scores, at, last, visible, SINK, RECENT)
        tie = (candidate & (rank == rank_of_last)).to(tl.int32)
        oldest = (tie > 0) & (ties + tl.cumsum(tie) <= missing)
        taken = ((at < last) & (at < visible) & (~candidate | (rank > rank_of_last) | oldest)).to(tl.int32)
        tl.store(ids + base + tl.cumsum(taken) - 1, at, mask=taken > 0)
        base += tl.sum(taken)
        ties += tl.sum(tie)
