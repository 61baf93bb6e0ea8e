"""The scheduler's side of memory: a block manager that frees single blocks of a running request and takes new ones."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from eval.serving.vllm.memory import Moves


@dataclass(frozen=True, kw_only=True)
class LookaheadSpec(FullAttentionSpec):
    """Full attention whose blocks are managed by LookaheadManager."""


class LookaheadManager(FullAttentionManager):
    """Blocks of one group of layers. In the request's list, the null block replaces a freed one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._moves: dict[str, Moves] = {}
        self._places: dict[str, dict[int, int]] = {}

    def wish(self, moves: dict[str, Moves]) -> None:
        """What the worker asks for; a newer wish replaces what was not done of an older one.

        A request may have finished since: it has no blocks, and nobody would ask for its wishes again.
        """
        for name in moves.keys() & self.req_to_blocks.keys():
            earlier = self._moves.get(name, Moves())
            self._moves[name] = Moves(earlier.evict + moves[name].evict, moves[name].fetch)

    def take_places(self) -> dict[str, dict[int, int]]:
        """Blocks given to chunks that were asked for, since the last time."""
        places, self._places = self._places, {}
        return places

    def remove_skipped_blocks(self, request_id: str, *args: Any, **options: Any) -> None:
        """Called whenever a request is to be given slots."""
        super().remove_skipped_blocks(request_id, *args, **options)
        moves = self._moves.pop(request_id, None)
        blocks = self.req_to_blocks.get(request_id)
        if moves is None or not blocks:
            return
        freed = [chunk for chunk in moves.evict if blocks[chunk] is not self._null_block]
        self.block_pool.free_blocks([blocks[chunk] for chunk in freed])
        for chunk in freed:
            blocks[chunk] = self._null_block
        missing = [chunk for chunk in moves.fetch if blocks[chunk] is self._null_block]
        spare = self.block_pool.get_num_free_blocks() - len(self.req_to_blocks)  # each may need one for its next token
        now = missing[-spare:] if spare > 0 else []  # the newest first
        if now:
            given = self.block_pool.get_new_blocks(len(now))
            for chunk, block in zip(now, given, strict=True):
                blocks[chunk] = block
                self._places.setdefault(request_id, {})[chunk] = block.block_id
        if later := [chunk for chunk in missing if chunk not in now]:
            self._moves[request_id] = Moves([], later)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Finished, aborted or preempted."""
        self._moves.pop(request_id, None)
        self._places.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def register_spec() -> None:
    """In every process; several times is once."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(LookaheadSpec, LookaheadManager, uniform_type_base_spec=FullAttentionSpec)
