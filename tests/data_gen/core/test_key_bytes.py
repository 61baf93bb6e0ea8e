"""The key codec against fp8 written out by hand in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import decode_keys, encode_keys, hadamard, pages_to_rows, rows_to_pages

NAN_CODES = (0x7F, 0xFF)


def fp8_value(code):
    """float8_e4m3fn from its bits: 1 sign, 4 exponent (bias 7), 3 mantissa; no infinity, one NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if (code & 0x7F) == 0x7F:
        return np.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = np.array([fp8_value(code) for code in range(256)])


def nearest_code(value):
    """Round to nearest, ties to the even code, by search over all positive codes; the sign of zero is kept."""
    distance = np.abs(VALUES[:0x7F] - abs(value))
    codes = np.flatnonzero(distance == distance.min())
    code = min(codes, key=lambda c: c & 1)
    return int(code) | (0x80 if np.signbit(value) else 0)


def reference_encode(keys):
    """keys: [n, d] float32 -> bytes [n, d + 4]: fp32 where the rule says fp32, everything else in float64."""
    rows = []
    for key in keys:
        scale = np.float32(max(np.float32(1e-4), np.abs(key).max())) / np.float32(448)
        scaled = key * (np.float32(1) / scale)  # one fp32 rounding each
        codes = [nearest_code(np.clip(np.float64(x), -448, 448)) for x in scaled]
        rows.append(codes + list(np.array(scale, dtype="<f4").tobytes()))
    return np.array(rows, dtype=np.uint8)


def reference_decode(rows):
    scale = rows[:, -4:].copy().view("<f4").astype(np.float64)
    return (VALUES[rows[:, :-4]] * scale).astype(np.float32)


def keys_strategy():
    finite = st.floats(-1e4, 1e4, width=32)
    return arrays(np.float32, st.tuples(st.integers(1, 3), st.just(8)), elements=finite)


def test_all_256_codes_decode():
    scale = torch.tensor([0.75]).view(torch.uint8)
    for code in range(256):
        row = torch.cat([torch.tensor([code], dtype=torch.uint8), scale])
        if code in NAN_CODES:
            with pytest.raises(InputError, match="NaN code"):
                decode_keys(row)
        else:
            assert decode_keys(row).item() == np.float32(VALUES[code] * 0.75)


def test_all_finite_codes_come_back():
    codes = torch.tensor([code for code in range(256) if code not in NAN_CODES], dtype=torch.uint8)
    rows = torch.cat([codes, torch.tensor([2.0**-7]).view(torch.uint8)])  # holds +-448: the scale is the row's own
    assert torch.equal(encode_keys(decode_keys(rows)), rows)


def test_every_midpoint_rounds_to_even():
    positive = VALUES[:0x7F]
    middle = (positive[1:] + positive[:-1]) / 2
    keys = np.concatenate([middle, -middle, [448.0]]).astype(np.float32)
    rows = encode_keys(torch.from_numpy(keys))
    assert rows[-4:].clone().view(torch.float32).item() == 1.0
    assert np.array_equal(rows[None].numpy(), reference_encode(keys[None]))
    assert not (rows[: len(middle)] & 1).any()


@given(keys_strategy())
def test_encoding_is_the_reference_bit_for_bit(keys):
    assert np.array_equal(encode_keys(torch.from_numpy(keys)).numpy(), reference_encode(keys))


def test_encoding_128_wide_keys_of_every_size():
    scales = torch.logspace(-8, 6, 60)[:, None]
    keys = torch.randn(60, 128, generator=torch.Generator().manual_seed(0)) * scales
    rows = encode_keys(keys)
    assert rows.shape == (60, 132)
    assert np.array_equal(rows.numpy(), reference_encode(keys.numpy()))
    assert np.array_equal(decode_keys(rows).numpy(), reference_decode(rows.numpy()))


@given(keys_strategy())
def test_a_round_trip_stays_within_half_a_step(keys):
    back = decode_keys(encode_keys(torch.from_numpy(keys))).numpy()
    amax = np.maximum(np.abs(keys).max(axis=1, keepdims=True), 1e-4)
    step = np.maximum(np.abs(keys) / 16, amax / 448 * 2.0**-10)  # 3 mantissa bits, subnormal floor
    assert np.all(np.abs(back - keys) <= step * (1 + 1e-5))


@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(6))), st.floats(2.0**-60, 2.0**60, width=32))
def test_decoding_is_the_reference_bit_for_bit(codes, scale):
    scales = np.full((len(codes), 1), scale, dtype="<f4").view(np.uint8)
    rows = torch.from_numpy(np.concatenate([codes, scales], axis=1))
    if np.isin(codes, NAN_CODES).any():
        with pytest.raises(InputError, match="NaN code"):
            decode_keys(rows)
    else:
        assert np.array_equal(decode_keys(rows).numpy(), reference_decode(rows.numpy()))


def test_zero_and_tiny_keys_use_the_floor():
    rows = encode_keys(torch.tensor([[0.0, -0.0], [1e-5, 0.0]]))
    assert torch.equal(rows[:, 2:].contiguous().view(torch.float32), torch.tensor([[1e-4], [1e-4]]) / 448)
    assert rows[0, :2].tolist() == [0x00, 0x80]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_has_no_code_is_refused(bad):
    with pytest.raises(InputError, match="NaN or infinity"):
        encode_keys(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_broken_scale_is_refused(scale):
    with pytest.raises(InputError, match="scale"):
        decode_keys(torch.cat([torch.zeros(2, dtype=torch.uint8), torch.tensor([scale]).view(torch.uint8)]))


def test_bfloat16_keys_and_leading_axes():
    keys = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = encode_keys(keys)
    assert rows.shape == (2, 3, 20)
    assert torch.equal(rows.reshape(-1, 20), encode_keys(keys.float().reshape(-1, 16)))
    assert encode_keys(torch.empty(0, 128)).shape == (0, 132)
    assert decode_keys(torch.empty(0, 132, dtype=torch.uint8)).shape == (0, 128)


@given(arrays(np.uint8, st.tuples(st.integers(0, 200), st.just(132))))
def test_pages_hold_the_rows(rows):
    pages = rows_to_pages(torch.from_numpy(rows)).numpy()
    assert pages.shape == (-(-len(rows) // 64), 8448)
    for chunk, row in enumerate(rows):
        page, slot = divmod(chunk, 64)
        assert np.array_equal(pages[page, slot * 128 : slot * 128 + 128], row[:128])
        assert np.array_equal(pages[page, 8192 + slot * 4 : 8192 + slot * 4 + 4], row[128:])
    assert np.array_equal(pages_to_rows(torch.from_numpy(pages), len(rows)).numpy(), rows)
    assert pages.sum(dtype=np.int64) == rows.sum(dtype=np.int64)  # the rest of the last page is zero


def test_bad_rows_and_pages_are_named():
    with pytest.raises(InputError, match="key rows"):
        decode_keys(torch.zeros(2, 132))
    with pytest.raises(InputError, match="key pages"):
        pages_to_rows(torch.zeros(1, 8447, dtype=torch.uint8), 3)
    with pytest.raises(InputError, match="hold 64 chunks, 65"):
        pages_to_rows(torch.zeros(1, 8448, dtype=torch.uint8), 65)
    for shape in ((), (4,), (2, 0)):
        with pytest.raises(InputError, match="key rows"):
            decode_keys(torch.zeros(shape, dtype=torch.uint8))
    for shape in ((), (132,), (2, 3, 132), (2, 4)):
        with pytest.raises(InputError, match="key rows"):
            rows_to_pages(torch.zeros(shape, dtype=torch.uint8))
    for shape in ((), (8448,), (1, 256), (1, 192), (1, 0)):
        with pytest.raises(InputError, match="key pages"):
            pages_to_rows(torch.zeros(shape, dtype=torch.uint8), 0)


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=2, max_side=4).map(lambda s: (*s, 32)),
              elements=st.floats(-100, 100, width=32)))  # fmt: skip
def test_hadamard_is_the_sylvester_matrix(x):
    matrix = np.ones((1, 1))
    while len(matrix) < 32:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    y = hadamard(torch.from_numpy(x))
    np.testing.assert_allclose(y.numpy(), x.astype(np.float64) @ matrix / np.sqrt(32), atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(hadamard(y).numpy(), x, atol=1e-4, rtol=1e-5)


def test_hadamard_keeps_inner_products_and_refuses_other_widths():
    a, b = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(hadamard(a) @ hadamard(b).T, a @ b.T, atol=2e-5, rtol=1e-5)
    with pytest.raises(InputError, match="power of two"):
        hadamard(torch.zeros(12))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hadamard_on_a_gpu_heeds_neither_autocast_nor_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x = torch.randn(300, 256)
    with torch.autocast("cuda", torch.bfloat16):
        found = hadamard(x.cuda())
    torch.testing.assert_close(found.cpu(), hadamard(x), atol=2e-6, rtol=1e-6)
