"""DeepSeek-V4 chunk keys as bytes: fp8 values and one fp32 scale per chunk, as rows or as 64-chunk pages.

Row: the d values as float8_e4m3fn, then the scale as four little-endian bytes (132 bytes for d = 128).
Page: the values of 64 chunks, then their 64 scales (8,448 bytes), the layout of a serving engine's key pool.
Widths come from the tensors, so that narrow models use the same code.
"""

from functools import lru_cache
from typing import Any

import torch

from data_gen.core.cpu import product
from data_gen.core.errors import InputError
from data_gen.core.tensors import require

PAGE = 64
"""Chunks in a page."""
SCALE_BYTES = 4
LARGEST = 448.0
"""The largest finite float8_e4m3fn."""
SMALLEST_RANGE = 1e-4
"""Floor of a key's largest magnitude, so that an all-zero key has a scale."""
NAN_CODE = 0x7F
"""All bits below the sign set: the only NaN of float8_e4m3fn."""


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Sylvester's Walsh-Hadamard transform over the last axis / sqrt(width); its own inverse.

    x: [..., d], d a power of two. Returns [..., d] fp32, whatever autocast or TF32 may say. Raises InputError on any
    other width.
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise InputError(f"Hadamard transform: width {width} is not a power of two")
    return _Hadamard.apply(x.float())


@lru_cache
def _doubles(width: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix / sqrt(width), [width, width] fp64, kept where it is used."""
    return (_signs(width).double() * width**-0.5).to(device)


@lru_cache
def _signs(width: int) -> torch.Tensor:
    """Sylvester's matrix, [width, width] of +-1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix


class _Hadamard(torch.autograd.Function):
    """Linear and symmetric: the gradient is the transform of the gradient, nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        if not x.is_cpu:  # one product instead of a launch a pass; neither autocast nor TF32 touches fp64
            return (x.double() @ _doubles(width, x.device)).float()
        half = min(width, 128)  # passes over memory are slow: a product takes the first seven at once
        with torch.autocast("cpu", enabled=False):
            x = product(x.reshape(-1, half), _signs(half)).view(x.shape)
        while half < width:
            even, odd = x.unflatten(-1, (-1, 2, half)).unbind(-2)
            x = torch.empty_like(x, memory_format=torch.contiguous_format)
            sums, differences = x.unflatten(-1, (-1, 2, half)).unbind(-2)
            torch.add(even, odd, out=sums)
            torch.sub(even, odd, out=differences)
            half *= 2
        return x.mul_(width**-0.5)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Hadamard.apply(gradient)


def encode_keys(keys: torch.Tensor) -> torch.Tensor:
    """Quantise keys: [..., d] -> rows [..., d + 4] uint8.

    scale = max(1e-4, amax) / 448 in fp32, not rounded to a power of two; values are x * (1 / scale), clipped to
    +-448 and rounded to nearest even. Raises InputError when a key is not finite.
    """
    keys = keys.float()
    if not bool(keys.isfinite().all()):
        raise InputError("encode_keys: a key holds NaN or infinity; it has no fp8 code")
    scale = (keys.abs().amax(dim=-1).clamp_min(SMALLEST_RANGE) / LARGEST).unsqueeze(-1)
    # Times the reciprocal, not divided: a serving engine does so, and a division rounds a few values otherwise.
    values = (keys * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def decode_keys(rows: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Rows [..., d + 4] uint8 -> keys [..., d] fp32: value times scale, one fp32 rounding.

    device: where the keys are wanted; rows are checked where they lie, then moved. Raises InputError on bytes that are
    no key, see `check_rows`.
    """
    check_rows(rows)
    values, scale = _split(rows if device is None else rows.to(device))
    if values.is_cpu:  # torch converts slowly there
        return _values().index_select(0, values.flatten().int()).view(values.shape).mul_(scale)
    return values.view(torch.float8_e4m3fn).float() * scale


@lru_cache
def _values() -> torch.Tensor:
    """What each of the 256 bytes means as a float8_e4m3fn: [256] fp32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def check_rows(rows: torch.Tensor) -> None:
    """Raise InputError when rows [..., d + 4] hold a NaN code, or a scale that is not a positive number.

    Of rows on a GPU the process ends instead, with a device assertion (`require`): check them on the CPU,
    before they move.
    """
    values, scale = _split(rows)
    require((values & NAN_CODE) != NAN_CODE, lambda: "NaN code (0x7f or 0xff) among the key bytes; they are damaged")
    good = scale.isfinite() & (scale > 0)
    require(good, lambda: "the scale of a key is not a positive finite number; the keys are damaged")


def rows_to_pages(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, d + 4] uint8 -> pages [ceil(N / 64), 64 * (d + 4)] uint8; the rest of the last page is zero bytes."""
    _check_layout(rows, dims=2)
    width = rows.shape[-1] - SCALE_BYTES
    values, scales = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % PAGE)).split([width, SCALE_BYTES], dim=-1)
    return torch.cat([values.reshape(-1, PAGE * width), scales.reshape(-1, PAGE * SCALE_BYTES)], dim=-1)


def pages_to_rows(pages: torch.Tensor, chunks: int) -> torch.Tensor:
    """Pages [P, 64 * (d + 4)] uint8 -> the first `chunks` rows [chunks, d + 4] uint8.

    Raises InputError when the pages hold fewer chunks.
    """
    if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.shape[1] % PAGE or pages.shape[1] <= PAGE * SCALE_BYTES:
        raise InputError(f"key pages: {pages.dtype} {list(pages.shape)} are not uint8 pages of {PAGE} chunks")
    if not 0 <= chunks <= len(pages) * PAGE:
        raise InputError(f"key pages: {len(pages)} pages hold {len(pages) * PAGE} chunks, {chunks} were asked for")
    width = pages.shape[-1] // PAGE - SCALE_BYTES
    values = pages[:, : PAGE * width].reshape(-1, width)
    scales = pages[:, PAGE * width :].reshape(-1, SCALE_BYTES)
    return torch.cat([values, scales], dim=-1)[:chunks]


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value bytes [..., d], scales [..., 1] fp32)."""
    _check_layout(rows)
    values, scales = rows.split([rows.shape[-1] - SCALE_BYTES, SCALE_BYTES], dim=-1)
    return values, scales.clone(memory_format=torch.contiguous_format).view(torch.float32)  # a view needs alignment


def _check_layout(rows: torch.Tensor, dims: int | None = None) -> None:
    wrong = rows.ndim == 0 if dims is None else rows.ndim != dims
    if wrong or rows.dtype != torch.uint8 or rows.shape[-1] <= SCALE_BYTES:
        raise InputError(f"key rows: {rows.dtype} {list(rows.shape)} are not uint8 values followed by a 4-byte scale")
