"""The 584-byte entry against a float64 reference that knows only the list of fp8 numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.errors import InputError
from eval.serving.entries import V4, EntryShape, decode_entries, encode_entries, entries_to_pages, gather_entries

NARROW = EntryShape(still=24, rope=8)


def fp8_numbers() -> np.ndarray:
    """The 127 non-negative numbers of float8_e4m3fn by code: four exponent bits (bias 7), three of mantissa."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def reference(entry: np.ndarray, shape: EntryShape) -> bytes:
    """One entry's row, from the rule alone."""
    numbers, codes, scales = fp8_numbers(), [], []
    for block in np.split(entry[: shape.still], range(64, shape.still, 64)):
        power = -13
        while np.abs(block).max() > 448 * 2.0**power:
            power += 1
        scales.append(power + 127)
        for value in block / 2.0**power:
            distance = np.abs(numbers - abs(value))
            nearest = np.flatnonzero(distance == distance.min())
            even = next(code for code in nearest if len(nearest) == 1 or code % 2 == 0)
            codes.append(even | (0x80 if np.signbit(value) else 0))
    single = entry[shape.still :].astype(np.float32).view(np.uint32).astype(np.uint64)
    half = ((single + 0x7FFF + ((single >> 16) & 1)) >> 16).astype("<u2")
    row = bytes(codes) + half.tobytes() + bytes(scales)
    return row + bytes(shape.bytes - len(row))


def test_sizes_are_those_of_the_serving_format():
    assert (V4.bytes, V4.value_bytes, V4.blocks, V4.page_bytes) == (584, 576, 7, 37376)


@pytest.mark.parametrize("shape", [V4, NARROW, EntryShape(still=100, rope=4)])
def test_bytes_equal_the_reference(shape):
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(6, shape.width, generator=generator) * torch.logspace(-6, 5, 6)[:, None]
    entries[0, 0], entries[1, :64] = -0.0, 0.0
    entries[2, :3] = torch.tensor([448.0, -1.0625, 1.1875])  # a scale that is a power of two itself, and halfway cases
    rows = encode_entries(entries, shape)
    assert [bytes(row.tolist()) for row in rows] == [reference(e, shape) for e in entries.double().numpy()]


@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=32, max_size=32))
def test_any_values_equal_the_reference(values):
    entry = torch.tensor(values)
    assert bytes(encode_entries(entry, NARROW).tolist()) == reference(entry.double().numpy(), NARROW)


@given(st.lists(st.floats(-100, 100, width=32), min_size=32, max_size=32))
def test_decoding_is_near_and_encoding_again_changes_no_value(values):
    entry = torch.tensor(values)
    decoded = decode_entries(encode_entries(entry, NARROW), NARROW)
    scale = max(float(entry[:24].abs().max()) / 448, 1e-4) * 2
    near = entry[:24].abs() * 2**-4 + scale * 2**-10
    assert bool(((decoded[:24] - entry[:24]).abs() <= near).all())
    assert torch.equal(decoded[24:], entry[24:].bfloat16().float())
    assert torch.equal(decode_entries(encode_entries(decoded, NARROW), NARROW), decoded)


@pytest.mark.parametrize("padding", [0, 64])
def test_slots_of_pages_are_rows(padding):
    rows = encode_entries(torch.randn(130, V4.width))
    pages = torch.nn.functional.pad(entries_to_pages(rows), (0, padding))
    assert pages.shape == (3, 37376 + padding)
    assert torch.equal(gather_entries(pages, torch.arange(130)), rows)
    slots = torch.tensor([[129, 0], [64, 63]], dtype=torch.int32)
    assert torch.equal(gather_entries(pages, slots), rows[slots.long()])
    wide = torch.nn.functional.pad(rows, (0, padding))
    assert torch.equal(gather_entries(wide, slots, page=1), rows[slots.long()])


def test_pages_lie_as_the_engine_lays_them():
    rows = encode_entries(torch.randn(64, V4.width))
    page = entries_to_pages(rows)[0]
    assert torch.equal(page[3 * 576 : 4 * 576], rows[3, :576])
    assert torch.equal(page[64 * 576 + 3 * 8 : 64 * 576 + 4 * 8], rows[3, 576:])


def test_damaged_bytes_are_refused():
    rows = encode_entries(torch.zeros(2, V4.width))
    for place, byte, what in [
        (5, 0x7F, "NaN code"),
        (447, 0xFF, "NaN code"),
        (576, 0xFF, "scales"),
        (449, 0x7F, "rotated"),
    ]:
        bad = rows.clone()
        bad[1, place] = byte
        if what == "rotated":
            bad[1, 448] = 0x80
        with pytest.raises(InputError, match=what):
            decode_entries(bad)


def test_what_is_no_entry_is_refused():
    for value in (float("nan"), float("inf"), 3.4e38):
        entry = torch.zeros(V4.width)
        entry[500] = value
        with pytest.raises(InputError, match="beyond bf16"):
            encode_entries(entry)
    with pytest.raises(InputError, match="511 values, not 512"):
        encode_entries(torch.zeros(511))
    with pytest.raises(InputError, match="not bytes"):
        decode_entries(torch.zeros(1, 584))
    pages = entries_to_pages(encode_entries(torch.zeros(3, V4.width)))
    for slots in ([64], [-1]):
        with pytest.raises(InputError, match="not all in 1 pages of 64"):
            gather_entries(pages, torch.tensor(slots))
    with pytest.raises(InputError, match="not uint8 of 64 x 584"):
        gather_entries(pages[:, :-1], torch.tensor([0]))
