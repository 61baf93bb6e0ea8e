"""The documents of a plan traced by a pool of actors on a Ray cluster, to the bytes that one process leaves."""

import time
from pathlib import Path
from typing import Any

from data_gen.backbones.load import absolute
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.cluster import Cluster, on_ray
from data_gen.core.shard import Shard
from data_gen.core.tell import Progress, Say
from data_gen.generate import expected_bytes, finish, open_backbone, open_stores, trace_document
from data_gen.text.needles import Split
from data_gen.text.plan import Plan
from data_gen.traces.failures import Failures, begun
from data_gen.traces.progress import PLAN
from data_gen.traces.store import MANIFEST, TraceStore, file_of, read_manifest

DEATHS = 3
"""Of actors at one document before it counts as one that cannot be traced."""


class Tracer:
    """One actor: loads the model once, writes traces, and returns {document, status, bytes, seconds} of each.

    model, trace: settings as JSON; out: the folder of the plan, which every node sees. Raises InputError as
    `trace_plan` does.
    """

    def __init__(self, model: str, trace: str, out: str) -> None:
        self.out = Path(out)
        self.trace, self.plan = TraceConfig.model_validate_json(trace), Plan(self.out / PLAN)
        self.backbone, _ = open_backbone(BackboneConfig.model_validate_json(model), Shard())
        self.backbone.check(self.trace)
        self.stores = open_stores(self.backbone.info, self.plan, self.trace, self.out)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        began, store, reason = time.perf_counter(), self.stores[item["side"]], None
        path = store.path(item["number"])
        if not path.exists():  # else a killed actor had written it
            reason = self._trace(store, **item)
        return {
            "document": item["document"],
            "side": item["side"],
            "status": reason or "",
            "bytes": 0 if reason else path.stat().st_size,
            "seconds": time.perf_counter() - began,
        }

    def _trace(self, store: TraceStore, document: str, side: Split, number: int) -> str | None:
        """As `trace_document`, unless it has killed actors before: Ray hands a document out again without end."""
        with begun(self.out, document) as deaths:
            if deaths >= DEATHS:
                return f"{deaths} workers died while they traced it, for want of memory perhaps"
            return trace_document(self.backbone, self.plan, side, number, store, self.trace)


def trace_on_ray(
    model: BackboneConfig,
    plan: Plan,
    trace: TraceConfig,
    out: Path,
    cluster: Cluster,
    max_failures: str,
    progress: Progress,
    say: Say,
) -> bool:
    """As `trace_plan`, by the workers of a cluster; the model is not loaded here."""
    planned = [
        {"document": row["document"], "side": side, "number": number}
        for side in plan.settings["sides"]
        for number, row in enumerate(plan.brief[side])
    ]
    rows = [row for row in planned if not (out / row["side"] / file_of(row["number"])).exists()]
    size = _expected(plan, rows, trace, out)
    told = "" if size is None else f", about {size / 2**20:.1f} MiB of traces"
    say(f"to trace on Ray: {len(rows)} documents by {cluster.workers} workers{told}")
    failed = Failures(out, Shard(), max_failures, len(planned))
    everywhere = model.model_copy(update={"path": absolute(model.path)})
    arguments = {"model": everywhere.model_dump_json(), "trace": trace.model_dump_json(), "out": str(out.absolute())}
    items = rows or planned[:1]  # an actor compares the settings even where nothing is left
    for _, done in zip(progress(items, "tracing"), on_ray(Tracer, arguments, items, cluster), strict=True):
        if size is None and (size := _expected(plan, rows, trace, out)) is not None:
            say(f"about {size / 2**20:.1f} MiB of traces")  # the first actor to load the model has begun the stores
        if done["status"] and not failed.add(done["document"], done["side"], done["status"]):
            say(str(failed))
            return False
    if failed.count:
        say(str(failed))
    stores = {side: TraceStore(out / side, read_manifest(out / side / MANIFEST)) for side in plan.settings["sides"]}
    finish(stores, out, say)
    return True


def _expected(plan: Plan, rows: list[dict[str, Any]], trace: TraceConfig, out: Path) -> int | None:
    """About how many bytes the traces will take; None before any model has been loaded."""
    begun = next((out / side / MANIFEST for side in plan.settings["sides"] if (out / side / MANIFEST).exists()), None)
    if begun is None:
        return None
    info, brief = read_manifest(begun).backbone, [plan.brief[row["side"]][row["number"]] for row in rows]
    return sum(expected_bytes(each["length"], each["rows"], info, trace) for each in brief)
