"""Level 1 over an engine's cache in Triton: mean keys are read through block tables, all sequences in one launch."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from indexer_train.spec import IndexerSpec

TILE = 64
"""Chunks of a program."""
STEP = 64
"""Columns of keys and queries at once."""


def block_scores(spec: IndexerSpec, queries: torch.Tensor, sums: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Joined scores of the complete chunks of B sequences, -inf after them: [B, N] fp32. Waits for nothing.

    queries: [B, L * size + 1], packed, fp32; sums: [blocks, L, width] fp32, over the tokens of each block; table:
    [B, N] int32, the block of each chunk. Means and queries are rounded to fp16 for their products.
    """
    shape, layers = spec.shape, len(spec.layers)
    (sequences, chunks), scores = table.shape, queries.new_empty(table.shape)
    _score[(triton.cdiv(chunks, TILE), sequences)](
        queries, queries.stride(0), sums, table, table.stride(0), scores, chunks,
        LAYERS=layers, HEADS=shape.heads, WIDTH=spec.key_width, BUMPS=shape.distance_bumps, SCALE=shape.scale,
        SLOT=shape.slot, BIAS=shape.bias, JOIN=shape.join, TOKENS=spec.chunking.tokens,
        HEAD_TILE=max(16, triton.next_power_of_2(shape.heads)),
        BUMP_TILE=triton.next_power_of_2(max(1, shape.distance_bumps)), TILE=TILE, STEP=STEP,
    )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=["table_stride", "chunks"])  # a history's length compiles nothing anew
def _score(
    queries,  # [B, LAYERS * SIZE + 1] fp32; the last column is the position
    query_stride,
    sums,  # [blocks, LAYERS, WIDTH] fp32
    table,  # [B, chunks] int32
    table_stride,
    scores,  # [B, chunks] fp32
    chunks,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BUMPS: tl.constexpr,
    SCALE: tl.constexpr,
    SLOT: tl.constexpr,
    BIAS: tl.constexpr,
    JOIN: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_TILE: tl.constexpr,  # heads with padding: a product needs 16
    BUMP_TILE: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (tiles of chunks, B)."""
    SIZE: tl.constexpr = HEADS * WIDTH + HEADS + BUMPS + SCALE + SLOT + BIAS
    sequence = tl.program_id(1).to(tl.int64)
    packed = queries + sequence * query_stride
    position = tl.load(packed + LAYERS * SIZE).to(tl.int32)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = at < tl.minimum((position + 1) // TOKENS, chunks)
    block = tl.load(table + sequence * table_stride + at, mask=there, other=0).to(tl.int64)
    head, bump = tl.arange(0, HEAD_TILE), tl.arange(0, BUMP_TILE)
    if BUMPS:
        distance = tl.maximum(position - at * TOKENS, 1).to(tl.float32)
        near = tl.minimum(tl.maximum(tl.log2(distance), 4.0), 3.0 + BUMPS)
        bumped = tl.maximum(1 - tl.abs(near[:, None] - (bump + 4)[None, :].to(tl.float32)), 0)
    joined = tl.full([TILE], float("-inf") if JOIN == "max" else 0.0, tl.float32)
    for layer in tl.static_range(LAYERS):
        part = packed + layer * SIZE
        match = tl.zeros([TILE, HEAD_TILE], tl.float32)
        for first in range(0, WIDTH, STEP):
            column = first + tl.arange(0, STEP)
            summed = tl.load(
                sums + ((block * LAYERS + layer) * WIDTH)[:, None] + column[None, :],
                mask=there[:, None] & (column < WIDTH)[None, :], other=0.0,
            )  # fmt: skip
            query = tl.load(
                part + (head * WIDTH)[None, :] + column[:, None],
                mask=(head < HEADS)[None, :] & (column < WIDTH)[:, None], other=0.0,
            )  # fmt: skip
            match = tl.dot((summed / TOKENS).to(tl.float16), query.to(tl.float16), match)
        weight = tl.load(part + HEADS * WIDTH + head, mask=head < HEADS, other=0.0)
        logit = tl.sum(tl.maximum(match, 0) * weight[None, :], 1)
        extra = part + HEADS * WIDTH + HEADS
        if BUMPS:
            bumps = tl.load(extra + bump, mask=bump < BUMPS, other=0.0)
            logit += tl.sum(bumped * bumps[None, :], 1)
        if SCALE:
            logit *= tl.exp(tl.load(extra + BUMPS))
        if SLOT:
            logit -= tl.load(extra + BUMPS + SCALE)
        if BIAS:
            logit += tl.load(extra + BUMPS + SCALE + SLOT)
        joined = tl.maximum(joined, logit) if JOIN == "max" else joined + logit
    if JOIN == "mean":
        joined = joined / LAYERS
    tl.store(scores + sequence * chunks + at, tl.where(there, joined, float("-inf")), mask=at < chunks)
