"""The connector that carries counters and moves of blocks between worker and scheduler, in vLLM's own messages."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from eval.serving.vllm.blocks import LookaheadManager
from eval.serving.vllm.memory import Moves
from eval.serving.vllm.worker import Worker, current

GAUGES = {
    "sequences": "Sequences that are being decoded or read",
    "resident_blocks": "Blocks of complete chunks in the pool that these sequences may read",
    "host_bytes": "Host memory taken by cold blocks",
}
COUNTERS = {
    "refreshes": "Resident sets chosen",
    "capped": "Sets that asked for more than the cap and got the best it allows",
    "full": "Sets that asked for so much more than the cap that everything was read",
    "rows": "Tokens read with a resident set",
    "read": "Blocks read by these tokens",
    "made": "Blocks that full attention would have read for them",
    "evicted": "Blocks that left the pool for host memory",
    "fetched": "Blocks that came back from host memory",
}


@dataclass
class Loads(KVConnectorMetadata):
    """Scheduler to worker. places: of each request, chunk -> the block it was given; preempted: requests that lost all
    their blocks; one that resumes on cached blocks looks to the worker as if it just went on."""

    places: dict[str, dict[int, int]] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)


@dataclass
class Wishes(KVConnectorWorkerMetadata):
    """Worker to scheduler."""

    moves: dict[str, Moves] = field(default_factory=dict)

    def aggregate(self, other: "Wishes") -> "Wishes":
        """Of several workers; tensor parallelism is refused, so there is one."""
        return Wishes(self.moves | other.moves)


@dataclass
class Stats(KVConnectorStats):
    """Counters since the last report, gauges as they are."""

    def reset(self) -> None:
        """Forget everything: it was reported."""
        self.data = {}

    def aggregate(self, other: "Stats") -> "Stats":
        """Add a later report: its counters to ours, its gauges instead of ours."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the engine's log prints."""
        return self.data

    def is_empty(self) -> bool:
        """Is there nothing to report?"""
        return not self.data


class PromMetrics(KVConnectorPromMetrics):
    """lookahead:NAME of every gauge and counter, beside vLLM's own on /metrics."""

    def __init__(self, config: Any, kinds: dict, labels: list[str], values: dict[int, list[object]]) -> None:
        super().__init__(config, kinds, labels, values)
        self._gauges, self._counters = (
            {name: kind(name=f"lookahead:{name}", documentation=text, labelnames=labels) for name, text in of.items()}
            for kind, of in ((self._gauge_cls, GAUGES), (self._counter_cls, COUNTERS))
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take one engine's report over into what /metrics shows."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in GAUGES:
                self._gauges[name].labels(*labels).set(value)
            else:
                self._counters[name].labels(*labels).inc(value)


class LookaheadConnector(KVConnectorBase_V1, SupportsHMA):
    """Both sides. It transfers nothing to other engines and never delays a request."""

    requires_kv_delivery = False

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._reported: dict[str, int] = {}
        self._managers: list[LookaheadManager] = []

    # --- worker ---

    @property
    def _worker(self) -> Worker:
        worker = current()
        assert worker is not None  # models are loaded before their caches are registered
        return worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Keys and values of each layer by its name, [blocks, ...], in the order of the layers."""
        self._worker.register_caches(list(kv_caches.values()))

    def start_load_kv(self, forward_context: Any, **options: Any) -> None:
        """Before a step: chunks that were given blocks come back."""
        self._worker.load(self._get_connector_metadata().places)

    def handle_preemptions(self, kv_connector_metadata: Loads) -> None:
        """Before a step: forget requests that lost their blocks."""
        self._worker.leave(kv_connector_metadata.preempted)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: copies are in the step's own order."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **options: Any) -> None:
        """Save nothing: chunks are copied when they are to leave."""

    def wait_for_save(self) -> None:
        """Return at once."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """Forget requests that are finished or aborted; none waits for a transfer."""
        self._worker.leave(finished_req_ids)
        return None, None

    def build_connector_worker_meta(self) -> Wishes | None:
        """After a step: the worker's message to the scheduler."""
        moves = self._worker.take_moves()
        return Wishes(moves) if moves else None

    def get_kv_connector_stats(self) -> Stats | None:
        """The worker's report since the last one. None until a gauge changes or a set is chosen: what each token adds
        waits for that, at most the tokens of a block, instead of a message a token."""
        if self.role is not KVConnectorRole.WORKER:
            return None
        now = self._worker.report()
        if all(now[name] == self._reported.get(name) for name in (*GAUGES, "refreshes")):
            return None
        news = {name: now[name] - self._reported.get(name, 0) for name in COUNTERS if name in now}
        self._reported = now
        return Stats({name: value for name, value in news.items() if value} | {n: now[n] for n in GAUGES})

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        """A report from what came from another process."""
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any
    ) -> Any:
        """Gauges and counters of the server's /metrics."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- scheduler ---

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Note the block managers that free and take single blocks."""
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = kv_cache_manager.coordinator.single_type_managers
        self._managers = [manager for manager in managers if isinstance(manager, LookaheadManager)]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """No token of a new request is anywhere else."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Do nothing: see `get_num_new_matched_tokens`."""

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """Before a step: the scheduler's message to the worker."""
        places: dict[str, dict[int, int]] = {}
        for manager in self._managers:
            places |= manager.take_places()
        return Loads(places, scheduler_output.preempted_req_ids or set())

    def update_connector_output(self, connector_output: Any) -> None:
        """After a step: take what the worker asked for to the block managers."""
        wishes = connector_output.kv_connector_worker_meta
        for manager in self._managers if isinstance(wishes, Wishes) else ():
            manager.wish(wishes.moves)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Its blocks may be freed at once; the client is told nothing."""
        return False, None
