"""DeepSeek-V4's attention entries as bytes: fp8 values in scaled blocks, bf16 rotated values, as rows or as pages.

Row: `still` fp8 values (float8_e4m3fn), `rope` rotated values as bf16, then one scale byte a block of 64 fp8 values
(UE8M0: 2^(byte - 127)) and zero bytes up to a multiple of eight. V4-Flash: 448 + 128 + 8 = 584 bytes.
Page: the values of 64 entries one after the other, then their 64 groups of scale bytes (37,376 bytes), the layout of a
serving engine's pool, which pads it to 37,440. Widths come from the shape, so that narrow models use the same code.
"""

from dataclasses import dataclass

import torch

from data_gen.core.entry_bytes import BLOCK, compressed_bytes
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import LARGEST, NAN_CODE, PAGE

SMALLEST_SCALE = 1e-4
"""Floor of amax / 448 before it is rounded up to a power of two: no scale is below 2^-13."""
EXPONENT_BIAS = 127
NAN_EXPONENT = 255
"""The only NaN of UE8M0."""


@dataclass(frozen=True)
class EntryShape:
    """Widths of an entry. still: values that do not turn (fp8); rope: rotated values, the last ones (bf16)."""

    still: int = 448
    rope: int = 64

    @property
    def width(self) -> int:
        """Values of an entry."""
        return self.still + self.rope

    @property
    def blocks(self) -> int:
        """Blocks of fp8 values, the last one possibly narrower."""
        return -(-self.still // BLOCK)

    @property
    def value_bytes(self) -> int:
        """Of one row: values without scales and padding."""
        return self.still + 2 * self.rope

    @property
    def bytes(self) -> int:
        """Of one row: values, scales, padding."""
        return compressed_bytes(self.still, self.rope)

    @property
    def scale_bytes(self) -> int:
        """Of one row: scales and padding."""
        return self.bytes - self.value_bytes

    @property
    def page_bytes(self) -> int:
        """Of a page of 64 entries."""
        return PAGE * self.bytes


V4 = EntryShape()
"""DeepSeek-V4-Flash and -Pro: 584 bytes."""


def encode_entries(entries: torch.Tensor, shape: EntryShape = V4) -> torch.Tensor:
    """Quantise entries: [..., still + rope] -> rows [..., bytes] uint8.

    A block's scale is the smallest power of two >= max(1e-4, amax / 448); values are x / scale, rounded to nearest
    even; rotated values are rounded to bf16. Raises InputError when an entry is not finite, or too large for bf16.
    """
    _check_width(entries, shape.width, "values")
    still, rope = entries.float().split([shape.still, shape.rope], dim=-1)
    rope = rope.to(torch.bfloat16)
    if not bool(still.isfinite().all() and rope.isfinite().all()):
        raise InputError("encode_entries: an entry holds NaN or infinity, or a rotated value beyond bf16")
    blocks = _blocks(still, shape)
    needed = (blocks.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    # frexp, because a logarithm in fp32 may round to the wrong side of a power of two.
    mantissa, exponent = torch.frexp(needed)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # of [0.5, 1): 0.5 is a power of two itself
    values = torch.ldexp(blocks, -exponent).to(torch.float8_e4m3fn).flatten(-2)[..., : shape.still]
    scales = (exponent.squeeze(-1) + EXPONENT_BIAS).to(torch.uint8)
    scales = torch.nn.functional.pad(scales, (0, shape.scale_bytes - shape.blocks))
    return torch.cat([values.view(torch.uint8), rope.contiguous().view(torch.uint8), scales], dim=-1)


def decode_entries(rows: torch.Tensor, shape: EntryShape = V4) -> torch.Tensor:
    """Rows [..., bytes] uint8 -> entries [..., still + rope] fp32, exact.

    Raises InputError on bytes that are not an entry, see `check_entries`.
    """
    check_entries(rows, shape)
    values, rope, scales = _split(rows, shape)
    blocks = _blocks(values.view(torch.float8_e4m3fn).float(), shape)
    still = torch.ldexp(blocks, scales.int().unsqueeze(-1) - EXPONENT_BIAS).flatten(-2)[..., : shape.still]
    return torch.cat([still, rope.float()], dim=-1)


def check_entries(rows: torch.Tensor, shape: EntryShape = V4) -> None:
    """Raise InputError when rows [..., bytes] hold a NaN code, a NaN scale or a rotated value that is not finite."""
    values, rope, scales = _split(rows, shape)
    if bool(((values & NAN_CODE) == NAN_CODE).any()):
        raise InputError("NaN code (0x7f or 0xff) among the entry bytes; the entries are damaged")
    if bool((scales == NAN_EXPONENT).any()):
        raise InputError("NaN code (0xff) among the scales of the entries; the entries are damaged")
    if not bool(rope.isfinite().all()):
        raise InputError("a rotated value of an entry is not finite; the entries are damaged")


def entries_to_pages(rows: torch.Tensor, shape: EntryShape = V4) -> torch.Tensor:
    """Rows [N, bytes] uint8 -> pages [ceil(N / 64), 64 * bytes] uint8; the rest of the last page is zero bytes."""
    _check_width(rows, shape.bytes, "bytes")
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % PAGE))
    values, scales = rows.split([shape.value_bytes, shape.scale_bytes], dim=-1)
    return torch.cat(
        [values.reshape(-1, PAGE * shape.value_bytes), scales.reshape(-1, PAGE * shape.scale_bytes)], dim=-1
    )


def gather_entries(pages: torch.Tensor, slots: torch.Tensor, shape: EntryShape = V4, page: int = PAGE) -> torch.Tensor:
    """The rows of some slots: pages [P, >= page * bytes] uint8, slots [...] integers -> [..., bytes] uint8.

    Slot s is place s % page of page s // page; page 1 stands for rows. Raises InputError on pages that are too short,
    and on slots outside them.
    """
    if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.shape[1] < page * shape.bytes:
        raise InputError(
            f"entry pages: {pages.dtype} {list(pages.shape)} are not uint8 of {page} x {shape.bytes} bytes"
        )
    return gather_rows(pages, slots, shape.value_bytes, shape.scale_bytes, page)


def gather_rows(pages: torch.Tensor, slots: torch.Tensor, values: int, scales: int, page: int) -> torch.Tensor:
    """Rows of `values` and `scales` bytes out of pages that hold first all values, then all scales.

    pages: [P, >= page * (values + scales)] uint8; slots: [...] -> [..., values + scales]. Raises InputError on slots
    outside the pages.
    """
    if slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < len(pages) * page:
        raise InputError(f"slots {int(slots.min())}..{int(slots.max())} are not all in {len(pages)} pages of {page}")
    which, place = (slots // page).long().unsqueeze(-1), (slots % page).long().unsqueeze(-1)
    value, scale = (torch.arange(count, device=pages.device) for count in (values, scales))
    places = [place * values + value, page * values + place * scales + scale]
    return pages[which, torch.cat(places, dim=-1)]


def _blocks(still: torch.Tensor, shape: EntryShape) -> torch.Tensor:
    """[..., still] -> [..., blocks, 64], the last block filled with zeros."""
    return torch.nn.functional.pad(still, (0, shape.blocks * BLOCK - shape.still)).unflatten(-1, (-1, BLOCK))


def _split(rows: torch.Tensor, shape: EntryShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fp8 codes [..., still], rotated values [..., rope] bf16, scale bytes [..., blocks])."""
    _check_width(rows, shape.bytes, "bytes")
    if rows.dtype != torch.uint8:
        raise InputError(f"entry rows: {rows.dtype} are not bytes")
    values, rope, scales = rows.split([shape.still, 2 * shape.rope, shape.scale_bytes], dim=-1)
    rope = rope.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)  # a view needs alignment
    return values, rope, scales[..., : shape.blocks]


def _check_width(rows: torch.Tensor, width: int, what: str) -> None:
    if rows.shape[-1] != width:
        raise InputError(f"attention entries: {list(rows.shape)} have {rows.shape[-1]} {what}, not {width}")
