"""Both sides of host memory, told of requests that lost their blocks: nothing that was known of those is used again."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm runs it")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.core.block_pool import BlockPool

from eval.serving.vllm.blocks import LookaheadManager, LookaheadSpec
from eval.serving.vllm.connector import LookaheadConnector, Wishes
from eval.serving.vllm.memory import Memory, Moves
from eval.serving.vllm.sequences import Chosen, Sequence, Sequences
from eval.serving.vllm.worker import Worker, _workers


@pytest.fixture
def manager():
    """Of a pool of nine blocks beside the null block."""
    spec = LookaheadSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32)
    pool = BlockPool(10, enable_caching=False, hash_block_size=16)
    return LookaheadManager(spec, pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=16)


def test_wishes_of_finished_requests_are_not_kept(manager):
    """A worker's message may come after its request is gone: a server that runs for weeks must not collect them."""
    for number in range(100):
        name = f"r{number}"
        manager.req_to_blocks[name] = manager.block_pool.get_new_blocks(4)
        manager.wish({name: Moves(evict=[1, 2])})
        manager.remove_skipped_blocks(name, 64)
        assert manager.block_pool.get_num_free_blocks() == 7
        manager.block_pool.free_blocks(
            block for block in manager.pop_blocks_for_free(name) if block is not manager.block_pool.null_block
        )
        manager.wish({name: Moves(fetch=[1])})
    assert len(manager._moves) == len(manager._places) == 0
    assert manager.block_pool.get_num_free_blocks() == 9


def test_a_preempted_request_starts_anew(monkeypatch):
    """It may resume with one token on cached blocks, at the next position, as if it just went on."""
    connector = object.__new__(LookaheadConnector)  # its base asks for a whole engine
    connector._managers, connector._role = [], KVConnectorRole.WORKER
    worker = object.__new__(Worker)
    worker.sequences, worker.memory, worker._left = Sequences(), Memory([torch.zeros(10, 2, 3)], 1 << 20), False
    monkeypatch.setitem(_workers, 0, worker)
    for name in ("stays", "preempted"):
        worker.sequences.held[name] = Sequence(position=63, force=Chosen(63, 4, torch.tensor([0, 2])))
        worker.memory.settle(name, {0, 2}, 4, torch.arange(1, 5))
        worker.memory.settle(name, {0, 1}, 4, torch.arange(1, 5))
        worker.memory.load(name, {1: 7})
    loads = connector.build_connector_meta(SimpleNamespace(preempted_req_ids={"preempted"}))
    connector.handle_preemptions(loads)
    assert worker._left, "its blocks can be somebody else's"
    assert worker.memory.of("stays").moved == {1: 7}
    assert worker.memory.of("preempted").moved == {}
    assert worker.memory.of("preempted").visible(4)[0].tolist() == [0, 1, 2, 3]
    assert worker.sequences.enter("stays", 64, alone=True).force is not None
    assert worker.sequences.enter("preempted", 64, alone=True).force is None
    assert "preempted" not in worker.take_moves()


def test_both_sides_agree_on_a_message(manager):
    """What a worker asks for reaches the manager, and what it gives comes back with the next step."""
    connector = object.__new__(LookaheadConnector)
    connector._managers = [manager]
    manager.req_to_blocks["a"] = manager.block_pool.get_new_blocks(4)
    for moves in (Moves(evict=[1]), Moves(fetch=[1])):
        connector.update_connector_output(SimpleNamespace(kv_connector_worker_meta=Wishes({"a": moves})))
        manager.remove_skipped_blocks("a", 64)
    loads = connector.build_connector_meta(SimpleNamespace(preempted_req_ids=None))
    assert loads.places == {"a": {1: manager.req_to_blocks["a"][1].block_id}}
    assert loads.preempted == set()
