"""The facts read from compiled kernels are facts: each is seen to change with its cause."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import triton
import triton.language as tl

from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.interpreter import compiled_only

pytestmark = compiled_only


@triton.jit
def square(x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile))


@triton.jit
def copy(x, y, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at * n))


def test_products_on_tensor_cores():
    found = compile_sm90(square, {"x": "*fp16:16", "y": "*fp32:16"}, {"N": 64}, num_warps=4)
    assert found.tensor_core["wgmma"] and not found.tensor_core["mma"]
    assert set(found.load_bytes) == {16} and found.spilled == 0 and found.shared >= 64 * 64 * 2
    assert "HGMMA" in found.sass
    small = compile_sm90(square, {"x": "*fp16:16", "y": "*fp32:16"}, {"N": 16}, num_warps=1)
    assert small.tensor_core["mma"] and not small.tensor_core["wgmma"]


def test_spills_are_seen():
    found = compile_sm90(square, {"x": "*fp16:16", "y": "*fp32:16"}, {"N": 32}, num_warps=1, maxnreg=40)
    assert found.spilled > 0 and found.registers <= 40


def test_byte_loads_are_seen():
    wide = compile_sm90(copy, {"x": "*u8:16", "y": "*u8:16"}, {"n": 1, "N": 2048}, num_warps=4)
    strided = compile_sm90(copy, {"x": "*u8:16", "y": "*u8:16", "n": "i32"}, {"N": 2048}, num_warps=4)
    assert set(wide.load_bytes) == {16} and set(strided.load_bytes) == {1}
