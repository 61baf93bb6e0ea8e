"""Level 2's attention in Triton: one token per sequence over the chosen entries and the window, in two kernels.

An output row of 512 values for 64 heads fills half of a program's registers. So a program keeps it in pieces of 128
values or fewer, and runs along its share of the entries with a running softmax: a tile of them at a time is read once,
dequantised once, and serves as keys and as values. A second kernel joins the shares and the sinks.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl

from data_gen.core.entry_bytes import BLOCK
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE
from eval.serving.entries import V4, EntryShape
from eval.serving.kernels.device import check_fp8
from eval.serving.kernels.score import check_pages

HEADS = 64
"""Heads a program: the rows of one tensor-core instruction of four warps."""
PROGRAMS = 132
"""Programs at once, one a multiprocessor, which they fill; so many share the entries of all sequences."""
TILES = (64, 32)
"""Entries read at once: the fewer where that keeps more than half of the multiprocessors busy."""
JOINED = 4096
"""Values of all shares that a program joins, about: more than its registers hold would go through memory."""
LOG2_E = math.log2(math.e)


def attend(
    query: torch.Tensor,
    entry_pages: torch.Tensor,
    chosen: torch.Tensor,
    window_pages: torch.Tensor,
    window: torch.Tensor,
    sinks: torch.Tensor,
    scale: float,
    shape: EntryShape = V4,
    page: int = PAGE,
) -> torch.Tensor:
    """`eval.serving.level2.attend` on the device, [B, H, D] as there: query and entries are rounded to fp16.

    Entries must lie within fp16's range, +-65504. chosen, window: int32, contiguous; pages may be views into wider
    pages a multiple of 16 bytes apart that start at multiples of 8. Damaged entries are not found here. Raises
    InputError on other layouts and on GPUs older than fp8.
    """
    check_fp8(query.device)
    batch, heads, width = query.shape
    _check(query, chosen, window, shape)
    check_pages(entry_pages, page * shape.bytes, start=8)
    check_pages(window_pages, shape.page_bytes, start=8)
    rows = batch * triton.cdiv(heads, HEADS)
    wide, narrow = ((size, _tiles(chosen, window, size)) for size in TILES)
    tile, tiles = wide if rows * wide[1] > PROGRAMS // 2 else narrow
    splits = max(1, min(tiles, PROGRAMS // rows))
    partial = torch.empty(batch, splits, heads, width, dtype=torch.float16, device=query.device)
    weight = torch.empty(batch, splits, heads, device=query.device)
    query = query.contiguous()
    # without maxnreg the compiler saves registers, and spills
    _attend_share[(splits, triton.cdiv(heads, HEADS), batch)](
        query,
        *_views(entry_pages[:, : page * shape.bytes]), chosen, chosen.shape[1], entry_pages.stride(0),
        *_views(window_pages[:, : shape.page_bytes]), window, window.shape[1], window_pages.stride(0),
        partial, weight, heads, scale * LOG2_E,
        HEADS=HEADS, STILL=shape.still, ROPE=shape.rope,
        FAR_PAGE=page, NEAR_PAGE=PAGE, TILE=tile, num_warps=8, maxnreg=255,
    )  # fmt: skip
    out = torch.empty_like(query)
    shares = triton.next_power_of_2(splits)
    columns = min(width, max(JOINED // shares, 64))
    _join[(heads, batch, width // columns)](
        partial, weight, sinks, out, splits, heads, LOG2_E,
        SPLITS=shares, WIDTH=width, COLUMNS=columns, num_warps=2,
    )  # fmt: skip
    return out


def _views(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same memory as bytes, bf16 and int64."""
    return pages, pages.view(torch.bfloat16), pages.view(torch.int64)


def _tiles(chosen: torch.Tensor, window: torch.Tensor, tile: int) -> int:
    return -(-chosen.shape[1] // tile) - (-window.shape[1] // tile)


def _check(query: torch.Tensor, chosen: torch.Tensor, window: torch.Tensor, shape: EntryShape) -> None:
    width = query.shape[2]
    if width != shape.width or width & (width - 1) or shape.still % BLOCK or shape.rope < 16 or shape.blocks > 7:
        raise InputError(
            f"kernels.sparse_attention: queries of {width} values and entries of {shape.still} + {shape.rope}; "
            f"the kernel needs 1 to 7 blocks of {BLOCK}, 16 or more rotated values, and a power of two together"
        )
    for listed in (chosen, window):
        if listed.dtype != torch.int32 or not listed.is_contiguous():
            raise InputError("kernels.sparse_attention: slots must be contiguous int32")


@triton.jit
def _attend_share(
    query,  # [B, heads, STILL + ROPE]
    far_pages,  # uint8, pages of chosen entries, `far_stride` bytes apart
    far_rope,  # the same memory as bf16
    far_scales,  # the same memory as int64: the scale bytes of an entry at once
    far_slots,  # [B, far_count] int32, -1 for none
    far_count,
    far_stride,
    near_pages,  # the same of the window
    near_rope,
    near_scales,
    near_slots,
    near_count,
    near_stride,
    partial,  # [B, splits, heads, STILL + ROPE] fp16: attention over this share alone
    weight,  # [B, splits, heads] fp32: log2 of its softmax's denominator
    heads,
    scale,  # of logits in bits
    HEADS: tl.constexpr,
    STILL: tl.constexpr,
    ROPE: tl.constexpr,
    FAR_PAGE: tl.constexpr,  # entries of a page
    NEAR_PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (splits, blocks of heads, B)."""
    ROW: tl.constexpr = STILL + 2 * ROPE
    BLOCKS: tl.constexpr = STILL // 128  # of values; an odd 64 after them
    split, splits, sequence = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < heads)[:, None]
    vectors = query + ((sequence * heads + head) * (STILL + ROPE))[:, None]
    if BLOCKS > 0:
        query_0 = _part(vectors, real, 0, 128)
    if BLOCKS > 1:
        query_1 = _part(vectors, real, 128, 128)
    if BLOCKS > 2:
        query_2 = _part(vectors, real, 256, 128)
    if STILL & 64:
        query_odd = _part(vectors, real, STILL - 64, 64)
    query_rope = _part(vectors, real, STILL, ROPE)
    out_0 = tl.zeros([HEADS, 128], tl.float32)
    out_1 = tl.zeros([HEADS, 128], tl.float32)
    out_2 = tl.zeros([HEADS, 128], tl.float32)
    out_odd = tl.zeros([HEADS, 64], tl.float32)
    out_rope = tl.zeros([HEADS, ROPE], tl.float32)
    top = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)

    far_tiles = tl.cdiv(far_count, TILE)
    tiles = far_tiles + tl.cdiv(near_count, TILE)
    for tile in tl.range(split * tiles // splits, (split + 1) * tiles // splits, num_stages=1):
        first, count, size = tile, far_count, FAR_PAGE
        pages, rope, scales, slots, stride = far_pages, far_rope, far_scales, far_slots, far_stride
        if tile >= far_tiles:  # numbers and pointers alone: a tensor out of a branch is more than some compilers can do
            first, count, size = tile - far_tiles, near_count, NEAR_PAGE
            pages, rope, scales, slots, stride = near_pages, near_rope, near_scales, near_slots, near_stride
        place = first * TILE + tl.arange(0, TILE)
        slot = tl.load(slots + sequence * count + place, mask=place < count, other=-1)
        there = slot >= 0
        page, row = (slot // size).to(tl.int64), slot % size
        start = tl.multiple_of(page * stride + row * ROW, 16)
        scale_bytes = tl.load(scales + page * (stride // 8) + size * (ROW // 8) + row, mask=there, other=0)
        turned = rope + tl.multiple_of((start + STILL) // 2, 8)[:, None] + tl.arange(0, ROPE)[None, :]
        values = pages + start[:, None]

        if BLOCKS > 0:
            entries_0 = _entries(values, scale_bytes, there, 128, 0)
        if BLOCKS > 1:
            entries_1 = _entries(values, scale_bytes, there, 128, 128)
        if BLOCKS > 2:
            entries_2 = _entries(values, scale_bytes, there, 128, 256)
        if STILL & 64:
            entries_odd = _entries(values, scale_bytes, there, 64, STILL - 64)
        rotated = tl.load(turned, mask=there[:, None], other=0.0).to(tl.float32).to(tl.float16)

        logits = tl.dot(query_rope, tl.trans(rotated))
        if BLOCKS > 0:
            logits = tl.dot(query_0, tl.trans(entries_0), logits)
        if BLOCKS > 1:
            logits = tl.dot(query_1, tl.trans(entries_1), logits)
        if BLOCKS > 2:
            logits = tl.dot(query_2, tl.trans(entries_2), logits)
        if STILL & 64:
            logits = tl.dot(query_odd, tl.trans(entries_odd), logits)
        logits = tl.where(there[None, :], logits * scale, -float("inf"))
        best = tl.maximum(top, tl.max(logits, axis=1))
        fade = tl.exp2(top - best)
        shares = tl.exp2(logits - best[:, None])
        total = total * fade + tl.sum(shares, axis=1)
        top = best
        shares = shares.to(tl.float16)
        if BLOCKS > 0:
            out_0 = tl.dot(shares, entries_0, out_0 * fade[:, None])
        if BLOCKS > 1:
            out_1 = tl.dot(shares, entries_1, out_1 * fade[:, None])
        if BLOCKS > 2:
            out_2 = tl.dot(shares, entries_2, out_2 * fade[:, None])
        if STILL & 64:
            out_odd = tl.dot(shares, entries_odd, out_odd * fade[:, None])
        out_rope = tl.dot(shares, rotated, out_rope * fade[:, None])

    at = (sequence * splits + split) * heads + head
    tl.store(weight + at, top + tl.log2(total), mask=head < heads)
    out = partial + (at * (STILL + ROPE))[:, None]
    norm = (1 / tl.maximum(total, 1e-30))[:, None]
    _bring(out, real, out_rope * norm, STILL)
    if BLOCKS > 0:
        _bring(out, real, out_0 * norm, 0)
    if BLOCKS > 1:
        _bring(out, real, out_1 * norm, 128)
    if BLOCKS > 2:
        _bring(out, real, out_2 * norm, 256)
    if STILL & 64:
        _bring(out, real, out_odd * norm, STILL - 64)


@triton.jit
def _part(vectors, real, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH values of the queries, from the FIRST on."""
    return tl.load(vectors + FIRST + tl.arange(0, WIDTH)[None, :], mask=real, other=0.0).to(tl.float16)


@triton.jit
def _bring(out, real, values, FIRST: tl.constexpr):
    """Store values of the output, from the FIRST on."""
    tl.store(out + FIRST + tl.arange(0, values.shape[1])[None, :], values.to(tl.float16), mask=real)


@triton.jit
def _entries(values, scale_bytes, there, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """WIDTH values of a tile of entries, exact in fp16: fp8 values times 2^(byte - 127), a byte every 64 values."""
    TILE: tl.constexpr = there.shape[0]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    codes = tl.load(values + column, mask=there[:, None], other=0).to(tl.float8e4nv, bitcast=True)
    block = FIRST // 64 + tl.arange(0, WIDTH // 64)[None, :]
    power = (((scale_bytes[:, None] >> (block * 8)) & 0xFF).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scaled = tl.reshape(codes.to(tl.float16), [TILE, WIDTH // 64, 64]) * power.to(tl.float16)[:, :, None]
    return tl.reshape(scaled, [TILE, WIDTH])


@triton.jit
def _join(
    partial, weight, sinks, out, splits, heads, log2_e, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS values of one head of one sequence: the tiles' outputs by their shares of the common denominator, sink
    included."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at = (sequence * splits + split) * heads + head
    bits = tl.load(weight + at, mask=split < splits, other=-float("inf"))
    sink = tl.load(sinks + head).to(tl.float32) * log2_e
    top = tl.maximum(tl.max(bits, axis=0), sink)
    share = tl.exp2(bits - top)
    total = tl.sum(share, axis=0) + tl.exp2(sink - top)
    parts = tl.load(partial + (at * WIDTH)[:, None] + column[None, :], mask=(split < splits)[:, None], other=0.0)
    joined = tl.sum(parts.to(tl.float32) * share[:, None], axis=0) / total
    tl.store(out + (sequence * heads + head) * WIDTH + column, joined.to(out.dtype.element_ty))
