"""Level 2's native logits in Triton: tiles of resident chunks, fp8 keys read from pages, fp16 dots."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE, SCALE_BYTES
from eval.serving.kernels.device import check_fp8

TILE = 64
"""Chunks scored at once."""
PROGRAMS = 528
"""Programs of all sequences, at most about so many: four a multiprocessor. 24,576 resident chunks are one tile each of
384; where there are more tiles a program keeps its queries on chip for a run of them."""
STAGES = 4
"""Depth of the pipeline over a run of tiles: slots are loaded first, then the keys there."""


def score_resident(
    query: torch.Tensor, weights: torch.Tensor, key_pages: torch.Tensor, slots: torch.Tensor, page: int = PAGE
) -> torch.Tensor:
    """`eval.serving.level2.score_resident` on the device: the same arguments, the query rounded to fp16.

    query: [B, H, d], d a power of two from 16; slots: [B, R] int32, contiguous; key_pages may be a view into wider
    pages a multiple of 16 bytes apart; it is read fastest where it starts at a multiple of 16 itself. Damaged keys are
    not found here. Raises InputError on other layouts and on GPUs older than fp8.
    """
    check_fp8(query.device)
    batch, heads, width = query.shape
    if width < 16 or width & (width - 1):
        raise InputError(f"kernels.score: keys of {width} values; the kernel needs a power of two from 16")
    size = page * (width + SCALE_BYTES)
    check_pages(key_pages, size, start=4)
    if slots.dtype != torch.int32 or not slots.is_contiguous():
        raise InputError("kernels.score: slots must be contiguous int32")
    scores = torch.empty(slots.shape, device=query.device)
    listed = slots.shape[1]
    padded = max(16, triton.next_power_of_2(heads))
    tiles = triton.cdiv(listed, TILE)
    runs = min(tiles, max(1, PROGRAMS // batch))
    _score[(runs, batch)](
        query.contiguous(), weights.contiguous(), key_pages, key_pages[:, :size].view(torch.float32), slots, scores,
        key_pages.stride(0), key_pages.stride(0) // SCALE_BYTES, heads, listed,
        HEADS=padded, WIDTH=width, PAGE=page, TILE=TILE, STAGES=STAGES if runs < tiles else 1,
    )  # fmt: skip
    return scores


def check_pages(pages: torch.Tensor, size: int, start: int) -> None:
    """Raise InputError unless pages are [P, >= size] contiguous bytes, 16 n bytes apart, the first at start * n."""
    fits = pages.dtype == torch.uint8 and pages.ndim == 2 and pages.shape[1] >= size and pages.stride(1) == 1
    if not fits or pages.stride(0) % 16 or pages.storage_offset() % start:
        raise InputError(
            f"Level-2 kernels: {pages.dtype} {list(pages.shape)}, strides {pages.stride()}, offset "
            f"{pages.storage_offset()}: no pages of {size} bytes, a multiple of 16 apart, that start at a multiple of "
            f"{start}"
        )


@triton.jit
def _score(
    query,  # [B, heads, WIDTH]
    weights,  # [B, heads]
    pages,  # uint8, key pages `page_stride` bytes apart
    scales,  # the same memory as fp32, `scale_stride` values apart
    slots,  # [B, listed] int32, -1 for none
    scores,  # [B, listed] fp32
    page_stride,
    scale_stride,
    heads,
    listed,
    HEADS: tl.constexpr,  # heads with padding: a power of two from 16
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (runs of tiles, B)."""
    sequence = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    head = tl.arange(0, HEADS)
    real = head < heads
    of_sequence = sequence * heads + head
    vectors = tl.load(query + (of_sequence * WIDTH)[:, None] + column[None, :], mask=real[:, None], other=0.0)
    weight = tl.load(weights + of_sequence, mask=real, other=0.0).to(tl.float32)
    operand = tl.trans(vectors.to(tl.float16))

    # Heads beyond the real ones are there because a dot needs 16; their weight is zero, so they add nothing.
    tiles, run, runs = tl.cdiv(listed, TILE), tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(run * tiles // runs, (run + 1) * tiles // runs, num_stages=STAGES):
        place = tile * TILE + tl.arange(0, TILE)
        slot = tl.load(slots + sequence * listed + place, mask=place < listed, other=-1)
        there = slot >= 0
        page, row = (slot // PAGE).to(tl.int64), slot % PAGE
        start = page * page_stride + row * WIDTH
        codes = tl.load(pages + start[:, None] + column[None, :], mask=there[:, None], other=0)
        # A page holds all values before all scales; `scales` counts in fp32, four bytes each.
        scale = tl.load(scales + page * scale_stride + PAGE * WIDTH // 4 + row, mask=there, other=0.0)
        keys = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        match = tl.maximum(tl.dot(keys, operand), 0.0)
        score = scale * tl.sum(match * weight[None, :], axis=1)
        tl.store(scores + sequence * listed + place, tl.where(there, score, -float("inf")), mask=place < listed)
