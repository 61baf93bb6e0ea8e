from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.core.errors import InputError
from eval.serving.kernels.device import warn_once
from eval.serving.pools import HotPool, best_copy, gather_copies, index_copy, unit_copies
from tests.eval.serving.segments import segmented


def pools(units, capacity, shape=(5, 7), dtype=torch.uint8, largest=4 * 48, pageable=None):
    data = torch.randint(0, 250, (units, *shape)).to(dtype)
    cold = segmented(largest, shape, dtype, pageable)
    cold.append(data)
    return data, cold


@settings(max_examples=30)
@given(
    st.sampled_from([index_copy, unit_copies]),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
    st.integers(0, 2**32 - 1),
)
def test_every_unit_lands_in_its_slot_and_nowhere_else(move, dtype, seed):
    random = np.random.default_rng(seed)
    data, cold = pools(int(random.integers(1, 30)), 0, dtype=dtype)
    hot = HotPool(12, (5, 7), dtype, "cpu")
    hot.storage.fill_(255)
    count = int(random.integers(0, min(12, cold.units) + 1))
    units = random.permutation(cold.units)[:count].astype(np.int32)
    slots = random.permutation(12)[:count].astype(np.int32)
    move(cold, units, hot, slots)
    for unit, slot in zip(units, slots, strict=True):
        assert torch.equal(hot.slots[slot], data[unit])
    others = np.setdiff1d(np.arange(12), slots)
    assert (hot.storage[others] == 255).all()


def test_the_machine_chooses():
    _, cold = pools(3, 2, pageable=True)
    assert best_copy(cold, HotPool(2, (5, 7), torch.uint8, "cpu")) is index_copy
    with pytest.raises(InputError, match="give both the same units"):
        best_copy(cold, HotPool(2, (7, 5), torch.uint8, "cpu"))


def test_a_slower_way_on_a_gpu_is_said_once(caplog):
    _, cold = pools(3, 2, pageable=True)
    hot = SimpleNamespace(layout=cold.layout, device=torch.device("cuda"))
    warn_once.cache_clear()
    for _ in range(2):
        assert best_copy(cold, hot) is unit_copies
    (said,) = caplog.messages
    assert said.endswith("the gather kernel needs a pinned cold pool")


def test_the_kernel_refuses_pageable_memory():
    pytest.importorskip("triton")
    _, cold = pools(3, 2, pageable=True)
    with pytest.raises(InputError, match="pageable"):
        gather_copies(cold, np.array([1]), HotPool(2, (5, 7), torch.uint8, "cpu"), np.array([0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pageable", [False, True])
@pytest.mark.parametrize("move", [index_copy, unit_copies, None])
def test_on_a_device(move, pageable):
    data, cold = pools(500, 0, shape=(21, 584), largest=1 << 20, pageable=pageable)
    hot = HotPool(300, (21, 584), torch.uint8, "cuda")
    hot.storage.fill_(255)
    units = np.random.default_rng(0).permutation(500)[:200].astype(np.int32)
    slots = np.random.default_rng(1).permutation(300)[:200].astype(np.int32)
    (move or best_copy(cold, hot))(cold, units, hot, slots)
    assert torch.equal(hot.slots[torch.from_numpy(slots).long().cuda()].cpu(), data[torch.from_numpy(units).long()])
    assert (hot.storage[np.setdiff1d(np.arange(300), slots)] == 255).all()
