import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.core.errors import InputError
from eval.serving.pools import ColdPool, HotPool, UnitLayout
from tests.eval.serving.segments import segmented

SHAPES = [((7, 584), torch.uint8), ((3, 2, 5), torch.bfloat16), ((2, 3), torch.float32), ((1,), torch.uint8)]


@settings(max_examples=30)
@given(st.sampled_from(SHAPES), st.lists(st.integers(0, 9), max_size=8), st.integers(1, 5))
def test_units_come_back_and_never_move(unit, batches, segment_units):
    shape, dtype = unit
    stride = UnitLayout(shape, dtype).stride
    pool = segmented(segment_units * stride, shape, dtype, pageable=True)
    stored, addresses = [], []
    for count in batches:
        data = torch.randint(0, 100, (count, *shape)).to(dtype)
        pool.append(data)
        stored += list(data)
        assert pool.units == len(stored)
        now = pool.addresses(np.arange(pool.units)).tolist()
        assert now[: len(addresses)] == addresses
        addresses = now
    for number, data in enumerate(stored):
        assert torch.equal(pool[number], data)
        assert pool[number].data_ptr() == pool.storage(number).data_ptr() == addresses[number]
        assert pool[number].is_contiguous()  # one copy moves all layers
        assert (addresses[number] - addresses[number // segment_units * segment_units]) % 16 == 0


def test_reserved_memory_is_used():
    pool = segmented(32, (16,), torch.uint8, pageable=True)
    pool.append(torch.full((1, 16), 3, dtype=torch.uint8))
    pool.reserve(4)
    reserved = [segment.data_ptr() for segment in pool.segments]
    pool.append(torch.arange(4, dtype=torch.uint8)[:, None].expand(4, 16))
    assert [segment.data_ptr() for segment in pool.segments] == reserved and len(reserved) == 3
    assert [int(pool[unit][0]) for unit in range(5)] == [3, 0, 1, 2, 3]


def test_a_short_history_takes_little_and_a_long_one_few_segments():
    pool = ColdPool((1024,), torch.uint8, pageable=True)
    sizes = []
    for count in (1, 1023, 1, 1023, 1, 7000, 1):
        pool.append(torch.full((count, 1024), len(sizes), dtype=torch.uint8))
        sizes.append(sum(segment.nbytes for segment in pool.segments) >> 20)
    assert sizes == [1, 1, 2, 2, 4, 8, 17]
    assert [int(pool[unit][0]) for unit in (0, 1023, 1024, 2047, 2048, 9048, 9049)] == [0, 1, 2, 3, 4, 5, 6]
    large = segmented(2 << 20, (1 << 20,), torch.uint8, pageable=True)
    large.reserve(5)
    assert [len(segment) for segment in large.segments] == [2, 2, 2]


@pytest.mark.parametrize("before", [0, 3, 4, 6])
def test_a_fork_goes_its_own_way_from_shared_segments(before):
    stride = UnitLayout((2, 3), torch.float32).stride
    pool = segmented(4 * stride, (2, 3), torch.float32, pageable=True)
    common, ours, theirs = torch.randn(3, 7, 2, 3, generator=torch.Generator().manual_seed(0))
    pool.append(common[:before])
    twin = pool.fork()
    twin.append(theirs)
    pool.append(ours)
    for side, own in ((pool, ours), (twin, theirs)):
        expected = torch.cat([common[:before], own])
        assert side.units == len(expected)
        assert all(torch.equal(side[unit], expected[unit]) for unit in range(side.units))
    same = [a.data_ptr() == b.data_ptr() for a, b in zip(pool.segments, twin.segments, strict=True)]
    assert sum(same) == before // 4


def test_one_unit_may_be_larger_than_a_segment():
    pool = segmented(16, (100,), torch.uint8, pageable=True)
    pool.append(torch.arange(300, dtype=torch.int32).to(torch.uint8).view(3, 100))
    assert len(pool.segments) == 3
    assert pool[2][0] == 200


def test_units_can_be_written_in_place():
    pool = ColdPool((2, 3), torch.float32, pageable=True)
    pool.append(torch.zeros(2, 2, 3))
    pool[1][0] = torch.ones(3)
    assert pool[1].tolist() == [[1, 1, 1], [0, 0, 0]] and pool[0].sum() == 0


@pytest.mark.parametrize("data", [torch.zeros(1, 3, 2), torch.zeros(1, 2, 3, dtype=torch.float16), torch.zeros(2, 3)])
def test_units_of_another_kind_are_refused(data):
    pool = ColdPool((2, 3), torch.float32, pageable=True)
    with pytest.raises(InputError, match="do not fit a pool of"):
        pool.append(data)


def test_memory_that_cannot_be_pinned_is_an_error_that_says_what_to_ask_for(cannot_pin):
    pool = ColdPool((4,), torch.uint8, pageable=False)
    with pytest.raises(InputError, match=r"pinned host memory beside the 0 segments.*pageable=True"):
        pool.append(torch.zeros(1, 4, dtype=torch.uint8))
    pool = ColdPool((4,), torch.uint8, pageable=True)
    pool.append(torch.zeros(1, 4, dtype=torch.uint8))
    assert ColdPool((4,), torch.uint8).pinned == torch.cuda.is_available()


def test_memory_that_is_not_there_is_an_error():
    pool = ColdPool((1 << 50,), torch.uint8, pageable=True)
    with pytest.raises(InputError, match="MiB of host memory"):
        pool.append(torch.zeros(1, 1, dtype=torch.uint8).expand(1, 1 << 50))


def test_empty_units_are_refused():
    with pytest.raises(InputError, match="holds nothing"):
        HotPool(4, (2, 0), torch.float32, "cpu")


def test_slots_are_aligned_and_apart():
    hot = HotPool(4, (21, 584), torch.uint8, "cpu")
    assert hot.slots.shape == (4, 21, 584)
    assert hot.storage.stride(0) == 12272 and hot.slots[1].is_contiguous()
    hot.slots[1] = 7
    assert hot.storage[[0, 2, 3]].sum() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_where_there_is_a_device():
    pool = ColdPool((21, 584), torch.uint8)
    data = torch.randint(0, 256, (50, 21, 584), dtype=torch.uint8, device="cuda")
    pool.append(data)
    torch.cuda.synchronize()
    assert pool.segments[0].is_pinned()
    assert all(torch.equal(pool[unit], data[unit].cpu()) for unit in range(50))
