import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the gather kernel needs triton")

from triton.runtime.interpreter import InterpretedFunction

from eval.serving.kernels import gather as kernel
from eval.serving.pools import ColdPool, HotPool, UnitLayout, gather_copies, index_copy
from tests.eval.serving.kernels.aot import compile_sm90
from tests.eval.serving.kernels.speed import speed
from tests.eval.serving.segments import segmented

ROW = (21, 584)
PAGE = (64, 21, 716)


@pytest.mark.parametrize("shape", [ROW, (3,), (16,), (4096,), (4100,), (8, 21, 584)])
def test_interpreted_against_index_copy(shape, monkeypatch):
    monkeypatch.setattr(kernel, "_gather", InterpretedFunction(kernel._gather.fn))
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    cold = segmented(3 * 12272, shape, torch.uint8, pageable=True)
    cold.append(torch.randint(0, 250, (9, *shape), dtype=torch.uint8))
    units = np.array([7, 0, 3, 8, 5], dtype=np.int32)
    slots = np.array([1, 6, 0, 4, 5], dtype=np.int32)
    expected, actual = (HotPool(7, shape, torch.uint8, "cpu") for _ in range(2))
    for hot in (expected, actual):
        hot.storage.fill_(255)
    index_copy(cold, units, expected, slots)
    kernel.gather(cold.addresses(units), torch.from_numpy(slots), actual.storage)
    assert torch.equal(actual.slots, expected.slots)
    assert (actual.storage[[2, 3]] == 255).all()


@pytest.mark.parametrize("shape", [ROW, PAGE])
def test_compiled_for_sm_90_with_wide_loads_and_no_spills(shape):
    words = UnitLayout(shape, torch.uint8).stride // 4
    found = compile_sm90(
        kernel._gather,
        {"sources": "*i64:16", "slots": "*i32:16", "hot": "*i32:16", "count": "i32"},
        {"WORDS": words, "TILE_WORDS": kernel.TILE // 4},
    )
    assert found.spilled == 0
    # Two scalars, where from and where to; all else moves 16 bytes a thread.
    loads = found.load_bytes
    assert loads.pop(8) == loads.pop(4) == 1 and set(loads) == {16}
    assert set(re.findall(r"st\.global\S*", found.ptx)) == {"st.global.v4.b32"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "count"), [(ROW, 6144), (PAGE, 16), (PAGE, 80), (PAGE, 322)])
def test_on_a_device(shape, count):
    cold = ColdPool(shape, torch.uint8)
    cold.append(torch.randint(0, 256, (count * 2, *shape), dtype=torch.uint8))
    expected, actual = (HotPool(count, shape, torch.uint8, "cuda") for _ in range(2))
    units = np.sort(np.random.default_rng(0).permutation(count * 2)[:count]).astype(np.int32)
    slots = np.random.default_rng(1).permutation(count).astype(np.int32)
    index_copy(cold, units, expected, slots)
    gather_copies(cold, units, actual, slots)
    assert torch.equal(actual.slots, expected.slots)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        gather_copies(cold, units, actual, slots)
    end.record()
    torch.cuda.synchronize()
    us = start.elapsed_time(end) / 5 * 1e3
    print(f"\n{shape} x {count}: {speed(us, count * cold.layout.stride, link=True)}")
