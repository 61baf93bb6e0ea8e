"""Items of work on a Ray cluster: a pool of actors that are made once each, and give back a few numbers per item."""

import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from data_gen.core.errors import InputError, explained

BLOCKS = 4096
"""Units that Ray hands out and tries again: items of one are done by one actor, one after the other."""
OBJECT_STORE = 128 << 20
"""Bytes of the local cluster's object store: only names and numbers pass through it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Cluster:
    """How many actors work, and how many GPUs each has (None: one where the cluster has any).

    It is a local one, or the one that RAY_ADDRESS names; where that has no GPU yet, None is refused.
    """

    workers: int = 1
    gpus: float | None = None


class Actor(Protocol):
    """Made once in each actor, of text alone; an item's columns come in and go out as text or numbers.

    It survives whatever is wrong with an item: an exception ends the whole run, in one line where it is an InputError
    or an OSError. What it has finished before it is killed it finds again.
    """

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Do one item."""
        ...


class _Columns:
    """An `Actor` as Ray Data calls it: columns of one row."""

    def __init__(self, actor: type[Actor], arguments: dict[str, str]) -> None:
        self.refusal = ""
        try:
            self.actor = actor(**arguments)
        except (InputError, OSError) as error:  # what cannot be made is made again for ever; this one says why instead
            self.refusal = explained(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        item = {name: values[0].item() if hasattr(values[0], "item") else values[0] for name, values in batch.items()}
        try:
            found = {} if self.refusal else self.actor(item)
        except (InputError, OSError) as error:
            found, self.refusal = {}, explained(error)
        return {name: [value] for name, value in (found | {"refusal": self.refusal}).items()}


def on_ray(
    actor: type[Actor], arguments: dict[str, str], items: list[dict[str, Any]], cluster: Cluster
) -> Iterator[dict[str, Any]]:
    """What a pool of actors makes of each item, in any order.

    One that is killed is replaced, and its items are handed out again. Raises InputError without Ray, where this
    machine has too few GPUs for all actors, where nobody said how many GPUs an actor has on a cluster that shows none,
    and in its words what an actor refuses.
    """
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise InputError("--ray needs Ray, which is not installed: pip install 'lookahead-indexer[ray]'") from error
    with _connected(ray, cluster):
        data = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS))
        done = data.map_batches(
            _Columns,
            batch_size=1,
            batch_format="numpy",
            fn_constructor_args=(actor, arguments),
            compute=ray.data.ActorPoolStrategy(size=cluster.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=_gpus(ray, cluster),
        )
        for row in done.iter_rows():
            if row["refusal"]:
                raise InputError(row["refusal"])
            yield row


def _gpus(ray: Any, cluster: Cluster) -> float:
    """Of each actor. Raises InputError where a local cluster lacks them: Ray would wait for more machines for ever.
    And where one that may grow has none yet: nobody knows whether any will come."""
    have, named = float(ray.cluster_resources().get("GPU", 0)), "RAY_ADDRESS" in os.environ
    if named and not have and cluster.gpus is None:
        raise InputError(
            "--ray: the cluster that RAY_ADDRESS names has no GPU now; say --gpus-per-worker 1 to wait for nodes that "
            "have some, or --gpus-per-worker 0 to work on its CPUs"
        )
    each = float(have > 0) if cluster.gpus is None else cluster.gpus
    if not named and cluster.workers * each > have:
        raise InputError(
            f"--ray: {cluster.workers} workers of {each:g} GPUs each, but this machine has {have:g}; ask for fewer, "
            "for a part of one (--gpus-per-worker 0.5), or name a cluster by RAY_ADDRESS"
        )
    return each


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """A cluster of this machine alone unless RAY_ADDRESS names one, whose warnings are heard: it may be full or gone.

    Signals stay whose they were.
    """
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    local: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        local = {"num_cpus": cluster.workers + 1, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    heard = "ERROR" if local else "WARNING"
    ray.init(log_to_driver=False, logging_level=heard, **local)
    logging.getLogger("ray.data").setLevel(heard)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        if here:
            for number, handler in before.items():
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()
