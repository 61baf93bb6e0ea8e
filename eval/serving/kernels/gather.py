"""Fetch: units straight from pinned host memory into device slots, 16 bytes a load, by a few programs."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

TILE = 4096
"""Bytes that one program moves at a time: every thread of four warps holds two 16-byte words."""

PROGRAMS = 64
"""Enough loads in flight to fill the host link, and most of the device left to the model."""


def gather(sources: torch.Tensor, slots: torch.Tensor, hot: torch.Tensor) -> None:
    """Copy units to their slots on the current stream.

    sources: [n] int64 addresses, aligned to 16 bytes, of memory that the device can read; slots: [n] int32; hot:
    [capacity, stride] uint8, stride a multiple of 16. sources and slots are on the device of hot.
    """
    words = hot.shape[1] // 4
    tiles = slots.numel() * triton.cdiv(words, TILE // 4)
    if tiles:
        grid = (min(PROGRAMS, tiles),)
        _gather[grid](sources, slots, hot.view(torch.int32), slots.numel(), words, TILE // 4)


@triton.jit
def _gather(sources, slots, hot, count, WORDS: tl.constexpr, TILE_WORDS: tl.constexpr):
    """WORDS: 4-byte words of a unit with its padding. Program p moves tiles p, p + programs, ... of all units."""
    tiles: tl.constexpr = (WORDS + TILE_WORDS - 1) // TILE_WORDS
    for tile in range(tl.program_id(0), count * tiles, tl.num_programs(0)):
        unit = tile // tiles
        at = (tile % tiles) * TILE_WORDS + tl.arange(0, TILE_WORDS)
        inside = at < WORDS
        # The promise of 16 is what makes a load 16 bytes wide; smaller ones do not fill the host link.
        source = tl.multiple_of(tl.load(sources + unit).to(tl.pointer_type(tl.int32)), 16)
        slot = tl.load(slots + unit).to(tl.int64)
        # Read once: it should not push out of the cache what the model still needs.
        data = tl.load(source + at, mask=inside, eviction_policy="evict_first")
        tl.store(hot + slot * WORDS + at, data, mask=inside)
