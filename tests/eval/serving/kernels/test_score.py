"""Triton's native logits against the torch reference, and what the compiler makes of them for an H100."""

import pytest
import torch

pytest.importorskip("triton", reason="the score kernel needs triton")

from triton.testing import do_bench_cudagraph

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys, rows_to_pages
from eval.serving import level2
from eval.serving.kernels import score as kernel
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only, in_interpreter, run_interpreted
from tests.eval.serving.kernels.speed import speed


def problem(batch, listed, heads, width, offset=0, page=64, device="cpu"):
    """Queries, weights, pages `offset` bytes inside wider ones, slots; NaN bytes wherever no slot points."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    rows = encode_keys(torch.randn(-(-batch * listed // 64) * 64, width, **draw))
    slots = torch.randperm(len(rows), **draw)[: batch * listed].view(batch, listed).int()
    slots[:, ::9] = level2.NONE
    present = slots[slots != level2.NONE].long()
    pages = torch.full_like(rows, 0xFF).index_copy_(0, present, rows[present])
    pages = rows_to_pages(pages) if page == 64 else pages
    padded = -(-(pages.shape[1] + 3 * offset) // 16) * 16
    wide = torch.full((len(pages), padded), 0xFF, dtype=torch.uint8, device=device)
    wide[:, offset : offset + pages.shape[1]] = pages
    query = torch.randn(batch, heads, width, **draw)
    weights = torch.randn(batch, heads, **draw) * (heads * width) ** -0.5
    return query.half(), weights, wide[:, offset : offset + pages.shape[1]], slots, page


@compiled_only
def test_in_the_interpreter():
    run_interpreted(__file__)


@in_interpreter
@pytest.mark.parametrize(
    ("batch", "listed", "heads", "width", "offset", "page", "programs"),
    [
        (2, 100, 16, 128, 16, 64, 528),
        (1, 64, 5, 16, 0, 64, 528),
        (3, 2, 64, 32, 48, 64, 528),
        (2, 70, 4, 128, 4, 1, 528),
        (2, 200, 4, 16, 0, 64, 4),  # two runs of two tiles each
    ],
)
def test_interpreted_against_torch(monkeypatch, batch, listed, heads, width, offset, page, programs):
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    given = problem(batch, listed, heads, width, offset, page)
    torch.testing.assert_close(kernel.score_resident(*given), level2.score_resident(*given), rtol=1e-5, atol=1e-5)


def test_other_layouts_are_refused():
    query, weights, pages, slots, _ = problem(1, 64, 16, 32)
    for bad, what in [
        ((query[..., :24], weights, pages, slots), "power of two"),
        ((query, weights, pages[:, :-1], slots), "no pages of"),
        ((query, weights, pages.int(), slots), "no pages of"),
        ((query, weights, torch.nn.functional.pad(pages, (0, 8)), slots), "multiple of 16"),
        ((query, weights, torch.nn.functional.pad(pages, (2, 14))[:, 2:], slots), "start at a multiple of 4"),
        ((query, weights, pages, slots.long()), "int32"),
    ]:
        with pytest.raises(InputError, match=what):
            kernel.score_resident(*bad)


@compiled_only
@pytest.mark.parametrize("stages", [1, kernel.STAGES])
def test_compiled_for_sm_90(stages):
    pointers = {"query": "*fp16:16", "weights": "*fp32:16", "pages": "*u8:16", "scales": "*fp32:16"}
    sizes = {"page_stride": "i32:16", "scale_stride": "i32:16", "heads": "i32:16", "listed": "i32:16"}
    constants = {"HEADS": 64, "WIDTH": 128, "PAGE": 64, "TILE": kernel.TILE, "STAGES": stages}
    found = compile_sm90(
        kernel._score, pointers | {"slots": "*i32:16", "scores": "*fp32:16"} | sizes, constants, num_warps=4
    )
    assert found.spilled == 0 and found.tensor_core["wgmma"] and not found.tensor_core["mma"]
    assert min(found.load_bytes) >= 4  # no bytes one by one
    if stages == 1:  # keys and queries come 16 bytes a load: 64 x 128 + 2 x 64 x 128 of them by 128 threads
        assert found.load_bytes[16] == 4 + 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("batch", "listed", "page"), [(1, 24576, 64), (8, 24576, 64), (32, 24576, 64), (1, 24576, 1), (2, 262144, 64)]
)
def test_on_a_device(batch, listed, page):
    given = problem(batch, listed, 64, 128, 16, page, device="cuda")
    torch.testing.assert_close(kernel.score_resident(*given), level2.score_resident(*given), rtol=1e-3, atol=1e-3)
    us = do_bench_cudagraph(lambda: kernel.score_resident(*given)) * 1e3
    moved = batch * listed * (132 + 4 + 4)
    print(f"\nLevel-2 score, {batch} x {listed} resident in pages of {page}, H 64: {speed(us, moved)}")
