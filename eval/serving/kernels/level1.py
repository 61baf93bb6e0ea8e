"""Level 1 in Triton: score, join, threshold and ordered compaction in one launch.

A program scores a run of pages of one layer with that layer's queries on chip; the program of the last layer waits for
the others of its run, joins their logits, and writes the chosen ids after those of the runs before. Waiting is safe
because the launch is cooperative: all programs of the grid are at work at once, so the caller launches no more than the
device holds. Lengths, thresholds and counts stay on the device; nothing is sorted.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from eval.serving.kernels.limits import SCRATCH

PAGE = tl.constexpr(64)


@triton.jit
def round_kernel(
    queries,  # [B, L * SIZE + 1] fp32, packed
    query_stride,
    operands,  # [B, L, HEADS, WIDTH] fp8
    weights,  # [B, L, HEADS] fp32, times each head's unit
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SOME: tl.constexpr,  # heads a program
):
    """Round the queries to fp8, each head with a unit of its own that uses fp8's whole range. Grid (L * parts, B)."""
    parts: tl.constexpr = HEADS // SOME
    layer, sequence = tl.program_id(0) // parts, tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % parts * SOME + tl.arange(0, SOME)
    packed = queries + sequence * query_stride + layer * SIZE
    query = tl.load(packed + head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    unit = tl.maximum(tl.max(tl.abs(query), 1) / 448.0, 1e-20)
    at = sequence * (tl.num_programs(0) // parts) * HEADS + layer * HEADS + head
    tl.store(weights + at, tl.load(packed + HEADS * WIDTH + head) * unit)
    rounded = (query * (1 / unit)[:, None]).to(tl.float8e4nv)
    tl.store(operands + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], rounded)


@triton.jit
def score_kernel(
    queries,  # [B, L * SIZE + 1] fp32, packed; the last column is the position
    query_stride,
    operands,  # of round_kernel; read with FP8 only
    weights,
    values,  # pages [P, L, 64 * WIDTH + 256 bytes] as fp8
    page_stride,
    layer_stride,
    scales,  # the same memory as fp32
    scale_page_stride,
    scale_layer_stride,
    table,  # [B, T] int32
    table_width,  # T
    cut_ends,  # [CUTS] int32, the longest context of each threshold
    cut_scores,  # [CUTS] fp32
    logits,  # [B, L, T * 64] fp32
    scores,  # [B, T * 64] fp32, the joined logits
    status,  # [B, runs * L] int32, zero; left above zero
    scratch,  # [B, SCRATCH] int32, set to zero for the next launch
    ids,  # [B, cap] int32
    found,  # [B] int32, how many; -1 where the table is too short for the position
    cap,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BUMPS: tl.constexpr,
    SCALE: tl.constexpr,
    SLOT: tl.constexpr,
    BIAS: tl.constexpr,
    JOIN: tl.constexpr,
    CUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    RUNS: tl.constexpr,  # runs of a sequence, rounded up to a power of two
    BUMP_TILE: tl.constexpr,
    TILE: tl.constexpr,
    FP8: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (runs * LAYERS, B)."""
    layer, run, runs = tl.program_id(0) % LAYERS, tl.program_id(0) // LAYERS, tl.num_programs(0) // LAYERS
    sequence = tl.program_id(1).to(tl.int64)
    packed = queries + sequence * query_stride
    position = tl.load(packed + LAYERS * (HEADS * WIDTH + HEADS + BUMPS + SCALE + SLOT + BIAS)).to(tl.int32)
    seen = (position + 1) // TOKENS
    visible = tl.where(seen > table_width * PAGE, 0, seen)  # a table too short: nothing is scored, and `found` is -1
    pages = tl.cdiv(visible, PAGE)
    first = (run * pages) // runs
    last = ((run + 1) * pages) // runs
    row = logits + (sequence * LAYERS + layer) * table_width * PAGE
    score_run(
        operands + (sequence * LAYERS + layer) * HEADS * WIDTH, weights + (sequence * LAYERS + layer) * HEADS,
        packed + layer * (HEADS * WIDTH + HEADS + BUMPS + SCALE + SLOT + BIAS),
        values + layer * layer_stride, page_stride, scales + layer * scale_layer_stride, scale_page_stride,
        table + sequence * table_width, row, position, first, last, visible,
        HEADS, WIDTH, BUMPS, SCALE, SLOT, BIAS, TOKENS, BUMP_TILE, FP8, STAGES,
    )  # fmt: skip
    if tl.program_id(0) == 0:  # limit_kernel, launched next, counts in it: that saves a launch that only clears it
        for start in range(0, SCRATCH, TILE):
            at = start + tl.arange(0, TILE)
            tl.store(scratch + sequence * SCRATCH + at, tl.zeros([TILE], tl.int32), mask=at < SCRATCH)
    tl.debug_barrier()  # all threads have written before one says so
    # The release below and the acquire that reads it order memory: who sees a flag sees the logits stored before it.
    flags = status + sequence * runs * LAYERS
    if layer < LAYERS - 1:
        tl.atomic_xchg(flags + run * LAYERS + layer, 1, sem="release")
    else:
        for other in range(LAYERS - 1):
            while tl.atomic_add(flags + run * LAYERS + other, 0, sem="acquire") == 0:
                pass
        # From the longest contexts to the shortest, so that the shortest one that still holds is what stays.
        threshold = tl.load(cut_scores + CUTS - 1)
        for cut in tl.static_range(CUTS - 1):
            end = tl.load(cut_ends + CUTS - 2 - cut)
            threshold = tl.where(position < end, tl.load(cut_scores + CUTS - 2 - cut), threshold)
        compact_run(
            logits + sequence * LAYERS * table_width * PAGE, scores + sequence * table_width * PAGE,
            table_width * PAGE, flags, ids + sequence * cap, found + sequence, cap,
            first * PAGE, last * PAGE, visible, seen, threshold, run, runs,
            LAYERS, JOIN, SINK, RECENT, RUNS, TILE,
        )  # fmt: skip


@triton.jit
def score_run(
    operands, weights, packed, values, page_stride, scales, scale_page_stride, table, row, position, first, last,
    visible, HEADS: tl.constexpr, WIDTH: tl.constexpr, BUMPS: tl.constexpr, SCALE: tl.constexpr, SLOT: tl.constexpr,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, BUMP_TILE: tl.constexpr, FP8: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One layer's logits of the pages [first, last), all terms (`PackedQuery.logits` of indexer_train/scoring.py)."""
    chunk, dim, head = tl.arange(0, PAGE), tl.arange(0, WIDTH), tl.arange(0, HEADS)
    if FP8:
        weight = tl.load(weights + head)
        operand = tl.trans(tl.load(operands + head[:, None] * WIDTH + dim[None, :]))
    else:
        weight = tl.load(packed + HEADS * WIDTH + head)
        operand = tl.trans(tl.load(packed + head[:, None] * WIDTH + dim[None, :]).to(tl.float16))
    extra = packed + HEADS * WIDTH + HEADS
    bump = tl.arange(0, BUMP_TILE)
    factor, offset = 1.0, 0.0
    if BUMPS:
        bumps = tl.load(extra + bump, mask=bump < BUMPS, other=0.0)
    if SCALE:
        factor = tl.exp(tl.load(extra + BUMPS))
    if BIAS:
        offset = tl.load(extra + BUMPS + SCALE + SLOT)
    if SLOT:
        offset -= tl.load(extra + BUMPS + SCALE)
    for page in tl.range(first, last, num_stages=STAGES):
        place = tl.load(table + page).to(tl.int64)
        key = tl.load(values + place * page_stride + chunk[:, None] * WIDTH + dim[None, :])
        scale = tl.load(scales + place * scale_page_stride + PAGE * WIDTH // 4 + chunk)
        match = tl.dot(key, operand) if FP8 else tl.dot(key.to(tl.float16), operand)
        logit = tl.sum(tl.maximum(match, 0) * weight[None, :], 1) * scale
        at = page * PAGE + chunk
        if BUMPS:
            distance = tl.maximum(position - at * TOKENS, 1).to(tl.float32)
            near = tl.minimum(tl.maximum(tl.log2(distance), 4.0), 3.0 + BUMPS)
            bumped = tl.maximum(1 - tl.abs(near[:, None] - (bump + 4)[None, :].to(tl.float32)), 0)
            logit += tl.sum(bumped * bumps[None, :], 1)
        tl.store(row + at, logit * factor + offset, mask=at < visible)


@triton.jit
def compact_run(
    logits, scores, stride, flags, ids, count, cap, first, last, visible, seen, threshold, run, runs,
    LAYERS: tl.constexpr, JOIN: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    RUNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Join the layers' logits of the chunks [first, last), whole pages, and write the ids of those to be resident."""
    total = 0
    for start in range(first, last, TILE):
        at = start + tl.arange(0, TILE)
        joined = tl.load(logits + at, mask=at < last, other=0.0)
        for layer in tl.static_range(1, LAYERS):
            logit = tl.load(logits + layer * stride + at, mask=at < last, other=0.0)
            joined = tl.maximum(joined, logit) if JOIN == "max" else joined + logit
        if JOIN == "mean":
            joined = joined / LAYERS
        tl.store(scores + at, joined, mask=at < last)
        kept = resident(joined, at, visible, threshold, SINK, RECENT)
        total += tl.sum(tl.where(at < last, kept, 0))
    # Ids are in order only behind those of all earlier runs. Each run tells its count, plus one because zero means that
    # it is not known yet, and adds up those before it. `volatile`: the loop must read memory again, not a register.
    tl.atomic_xchg(flags + run * LAYERS + LAYERS - 1, total + 1)
    other = tl.arange(0, RUNS)
    said = flags + other * LAYERS + LAYERS - 1
    before = tl.load(said, mask=other < run, other=1, volatile=True)
    while tl.min(before) == 0:
        before = tl.load(said, mask=other < run, other=1, volatile=True)
    base = tl.sum(before - 1)  # runs from this one on were loaded as 1 and add nothing
    if run == runs - 1:
        tl.store(count, tl.where(seen > visible, -1, base + total))
    tl.debug_barrier()  # the scores may have been written by other threads
    for start in range(first, last, TILE):
        at = start + tl.arange(0, TILE)
        kept = resident(tl.load(scores + at, mask=at < last), at, visible, threshold, SINK, RECENT)
        kept = tl.where(at < last, kept, 0)
        place = base + tl.cumsum(kept) - 1
        tl.store(ids + place, at, mask=(kept > 0) & (place < cap))
        base += tl.sum(kept)


@triton.jit
def resident(score, at, visible, threshold, SINK: tl.constexpr, RECENT: tl.constexpr):
    """1 for protected chunks and those that reach the threshold, 0 for others."""
    candidate = (at >= SINK) & (at < visible - RECENT)
    return ((at < visible) & ((score >= threshold) | ~candidate)).to(tl.int32)
