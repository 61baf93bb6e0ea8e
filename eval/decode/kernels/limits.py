"""Level 1's second launch: floor, cap and budget, where the threshold alone chose too few or too many.

One program a sequence. In the ordinary case it only fills up the row of ids; otherwise it finds the score of the last
chunk to keep by counting the scores' digits (four rounds over the scores, no sort) and writes the ids anew.
"""

import triton
import triton.language as tl


@triton.jit
def limit_kernel(
    positions,  # [B] fp32 with a stride: the last column of the packed queries
    position_stride,
    scores,  # [B, N] fp32
    chunks,  # N
    status,  # [B, STATUS] int32, set to zero for the next call
    ids,  # [B, cap] int32
    counts,  # [B] int32, of the threshold; replaced by what is resident
    demand,  # [B] int32
    share,  # [1] fp64, the budget
    floor,
    cap,
    BUDGET: tl.constexpr,
    TOKENS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    STATUS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (B,)."""
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + sequence)
    visible = (tl.load(positions + sequence * position_stride).to(tl.int32) + 1) // TOKENS
    visible = tl.where(count < 0, 0, visible)  # the table is too short: nothing was scored
    candidates = tl.maximum(visible - RECENT - SINK, 0)
    protected = visible - candidates
    if BUDGET:
        asked = tl.minimum(tl.maximum((tl.load(share) * visible).to(tl.int32), 1), candidates)
    else:
        asked = tl.maximum(count, 0) - protected
    kept = tl.minimum(tl.maximum(asked, floor - protected), tl.minimum(cap - protected, candidates))
    row = ids + sequence * cap
    if BUDGET or kept != asked:
        write_best(scores + sequence * chunks, row, visible, kept, SINK, RECENT, TILE)
    tl.store(demand + sequence, asked)
    tl.store(counts + sequence, tl.where(count < 0, -1, protected + kept))
    for start in range(protected + kept, cap, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(row + at, tl.full([TILE], -1, tl.int32), mask=at < cap)
    for start in range(0, STATUS, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(status + sequence * STATUS + at, tl.zeros([TILE], tl.int32), mask=at < STATUS)


@triton.jit
def write_best(scores, ids, visible, kept, SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr):
    """Write the protected chunks and the `kept` best others, ties to the older; `kept` is at most what there is."""
    digit = tl.arange(0, 256)
    prefix = tl.zeros([], tl.int64)
    missing = kept
    for shift in tl.static_range(24, -1, -8):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, visible, TILE):
            at = start + tl.arange(0, TILE)
            rank, candidate = ranks(scores, at, visible, SINK, RECENT)
            alike = candidate & ((rank >> (shift + 8)) == prefix)
            histogram += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=alike)
        found = tl.sum((tl.cumsum(histogram, reverse=True) >= missing).to(tl.int32)) - 1
        missing -= tl.sum(tl.where(digit > found, histogram, 0))
        prefix = prefix * 256 + found
    base, ties = 0, 0
    for start in range(0, visible, TILE):
        at = start + tl.arange(0, TILE)
        rank, candidate = ranks(scores, at, visible, SINK, RECENT)
        tie = (candidate & (rank == prefix)).to(tl.int32)
        among = (tie > 0) & (ties + tl.cumsum(tie) <= missing)
        taken = (at < visible) & (~candidate | (rank > prefix) | among)
        place = base + tl.cumsum(taken.to(tl.int32)) - 1
        tl.store(ids + place, at, mask=taken)
        base += tl.sum(taken.to(tl.int32))
        ties += tl.sum(tie)


@triton.jit
def ranks(scores, at, visible, SINK: tl.constexpr, RECENT: tl.constexpr):
    """The scores as integers from 0 to 2^32 - 1 that sort like them, -0 and 0 alike, and which chunks compete."""
    score = tl.load(scores + at, mask=at < tl.cdiv(visible, 64) * 64, other=0.0)  # whole pages, for wide loads
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return rank, (at >= SINK) & (at < visible - RECENT)
