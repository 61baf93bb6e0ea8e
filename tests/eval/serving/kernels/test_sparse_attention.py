"""Triton's attention over resident entries against the torch reference, and what the compiler makes of it."""

import pytest
import torch

pytest.importorskip("triton", reason="the attention kernel needs triton")

from triton.testing import do_bench_cudagraph

from data_gen.core.errors import InputError
from eval.serving import level2
from eval.serving.entries import V4, EntryShape, encode_entries, entries_to_pages
from eval.serving.kernels import sparse_attention as kernel
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only, in_interpreter, run_interpreted
from tests.eval.serving.kernels.speed import speed

NARROW = EntryShape(still=64, rope=64)


def pool(entries, slots, shape, offset, page=64):
    """Entries [N, width] in pages (rows for page 1), `offset` bytes inside wider ones; NaN where no slot points."""
    rows = encode_entries(entries, shape)
    listed = slots[slots != level2.NONE].long()
    poisoned = torch.full_like(rows, 0xFF).index_copy_(0, listed, rows[listed])
    pages = entries_to_pages(poisoned, shape) if page == 64 else poisoned
    padded = -(-(pages.shape[1] + 2 * offset) // 16) * 16
    wide = torch.full((len(pages), padded), 0xFF, dtype=torch.uint8, device=pages.device)
    wide[:, offset : offset + pages.shape[1]] = pages
    return wide[:, offset : offset + pages.shape[1]]


def problem(batch, heads, chosen, window, shape=V4, dtype=torch.float16, offset=0, page=64, device="cpu"):
    """Arguments of attend: large and small entries, sharp queries, absent slots, a sequence without a window."""
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    entries = torch.randn(max(1, batch * chosen), shape.width, **draw) * (1 + torch.rand(1, shape.width, **draw) * 8)
    near = torch.randn(max(1, batch * window), shape.width, **draw)
    slots = torch.randperm(batch * chosen, **draw).view(batch, chosen).int()
    window_slots = torch.randperm(batch * window, **draw).view(batch, window).int()
    slots[:, 1::11] = level2.NONE
    window_slots[-1] = level2.NONE
    return (
        torch.randn(batch, heads, shape.width, **draw).to(dtype),
        pool(entries, slots, shape, offset, page),
        slots,
        pool(near, window_slots, shape, offset),
        window_slots,
        torch.randn(heads, **draw) * 3,
        shape.width**-0.5,
        shape,
        page,
    )


@compiled_only
def test_in_the_interpreter():
    run_interpreted(__file__)


@in_interpreter
@pytest.mark.parametrize(
    ("batch", "heads", "chosen", "window", "shape", "dtype", "offset", "page"),
    [
        (2, 5, 70, 40, V4, torch.float32, 64, 64),
        (1, 70, 33, 0, NARROW, torch.float16, 0, 64),
        (2, 16, 30, 20, NARROW, torch.bfloat16, 16, 1),
        (30, 2, 160, 20, NARROW, torch.float16, 0, 64),
        (1, 3, 0, 20, NARROW, torch.float16, 0, 64),
        (70, 2, 200, 20, NARROW, torch.float16, 0, 64),  # a program a sequence, five tiles each
    ],
)
def test_interpreted_against_torch(batch, heads, chosen, window, shape, dtype, offset, page):
    given = problem(batch, heads, chosen, window, shape, dtype, offset, page)
    found, expected = kernel.attend(*given), level2.attend(*given)
    assert found.dtype == dtype
    step = 2**-7 if dtype == torch.bfloat16 else 2**-10  # one rounding of the result
    torch.testing.assert_close(found, expected, rtol=step, atol=step * float(expected.abs().max()))


@in_interpreter
def test_a_token_without_history_attends_to_the_sink_alone():
    given = list(problem(1, 4, 8, 8, NARROW))
    given[2] = torch.full_like(given[2], level2.NONE)
    assert torch.equal(kernel.attend(*given), torch.zeros(1, 4, NARROW.width, dtype=torch.float16))


def test_other_layouts_are_refused():
    good = list(problem(1, 4, 8, 8, NARROW))
    for place, bad, what in [
        (0, good[0][..., :64], "queries of 64"),
        (1, good[1][:, :-1], "no pages of"),
        (3, good[3].int(), "no pages of"),
        (2, good[2].long(), "int32"),
        (4, good[4][:, ::2], "contiguous"),
    ]:
        with pytest.raises(InputError, match=what):
            kernel.attend(*good[:place], bad, *good[place + 1 :])
    with pytest.raises(InputError, match="24 \\+ 8"):
        kernel.attend(*problem(1, 4, 8, 8, EntryShape(still=24, rope=8)))


@compiled_only
@pytest.mark.parametrize("tile", kernel.TILES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_compiled_for_sm_90(tile, dtype):
    signature = {"query": f"*{dtype}:16"}
    for side in ("far", "near"):
        signature |= {f"{side}_pages": "*u8:16", f"{side}_rope": "*bf16:16", f"{side}_scales": "*i64:16"}
        signature |= {f"{side}_slots": "*i32:16", f"{side}_count": "i32:16", f"{side}_stride": "i32:16"}
    signature |= {"partial": "*fp16:16", "weight": "*fp32:16", "heads": "i32:16", "scale": "fp32"}
    constants = {
        "HEADS": kernel.HEADS,
        "STILL": V4.still,
        "ROPE": V4.rope,
        "FAR_PAGE": 64,
        "NEAR_PAGE": 64,
        "TILE": tile,
    }
    found = compile_sm90(kernel._attend_share, signature, constants, num_warps=8, maxnreg=255)
    # four registers may be set aside, once, before the entries are read
    assert found.spilled <= 16 and found.tensor_core["wgmma"] and not found.tensor_core["mma"]
    # values and queries come 16 bytes a load, scales and rotated values 8, slots 4; a program fits a multiprocessor
    assert min(found.load_bytes) >= 4 and found.load_bytes[16] >= 9
    assert found.registers * 256 <= 65536 and found.shared <= 227 * 1024


@compiled_only
@pytest.mark.parametrize("splits", [8, 32, 128])
def test_joining_compiled_for_sm_90(splits):
    signature = {"partial": "*fp16:16", "weight": "*fp32:16", "sinks": "*fp32:16", "out": "*fp16:16"}
    signature |= {"splits": "i32", "heads": "i32:16", "log2_e": "fp32"}
    columns = min(V4.width, max(kernel.JOINED // splits, 64))
    constants = {"SPLITS": splits, "WIDTH": V4.width, "COLUMNS": columns}
    found = compile_sm90(kernel._join, signature, constants, num_warps=2)
    assert found.spilled == 0 and min(found.load_bytes) >= 4 and found.load_bytes[16]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("batch", "page"), [(1, 64), (8, 64), (16, 64), (32, 64), (32, 1)])
def test_on_a_device(batch, page):
    given = problem(batch, 64, 512, 128, offset=64, page=page, device="cuda")
    expected = level2.attend(*given)
    torch.testing.assert_close(kernel.attend(*given), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    us = do_bench_cudagraph(lambda: kernel.attend(*given)) * 1e3
    moved = batch * (640 * (V4.bytes + 4) + 2 * 64 * V4.width * 2)
    print(
        f"\nsparse MQA, {batch} x 640 entries of 584 bytes in pages of {page}, 64 heads: {speed(us, moved)}"
        + (", target 25 us" if batch == 32 else "")
    )
