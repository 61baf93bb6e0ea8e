"""Planned documents through a backbone into trace stores: any number of workers, each continuing where one stopped."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from data_gen.backbones.load import Backbone, adapter, limits_of, load_backbone, load_tokenizer, public_name
from data_gen.config import BackboneConfig, DocumentsConfig, TraceConfig
from data_gen.core.cpu import keep_freed_memory
from data_gen.core.errors import InputError
from data_gen.core.files import one_line
from data_gen.core.keys import KEY_RECIPES
from data_gen.core.shard import Shard
from data_gen.core.tell import Progress, Say
from data_gen.text.documents import Document
from data_gen.text.needles import Split
from data_gen.text.plan import SIDES, Plan, open_plan
from data_gen.traces import failures
from data_gen.traces.store import TraceStore
from data_gen.traces.types import BackboneInfo, DocumentMeta, Manifest, RawTrace, Span


def generate(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    documents: DocumentsConfig,
    trace: TraceConfig,
    out: Path,
    sides: Sequence[Split] = SIDES,
    progress: Progress = lambda items, _: items,
) -> list[TraceStore]:
    """Plan and trace `sides` with an open backbone, in one process; returns their stores.

    Raises InputError as `open_plan` and `trace_plan` do, and when a document fails.
    """
    limits = limits_of(backbone.model.config)
    plan = open_plan(out, documents, trace, tokenizer, limits, sides)
    if not trace_plan(backbone, plan, trace, out, Shard(), "0", progress, lambda _: None):
        raise InputError(f"{out / failures.FAILED}: some documents could not be traced, and this file says why")
    return [TraceStore.open(out / side) for side in sides]


def plan_documents(
    model: BackboneConfig, documents: DocumentsConfig, trace: TraceConfig, out: Path, check: bool = True
) -> Plan:
    """The plan in `out`, without loading the model; check: compare one that is there with its source.

    Raises InputError as `open_plan` does.
    """
    tokenizer, limits = load_tokenizer(model)
    return open_plan(out, documents, trace, tokenizer, limits, check=check)


def open_backbone(model: BackboneConfig, shard: Shard) -> tuple[Backbone, PreTrainedTokenizerBase]:
    """(backbone, tokenizer) on this worker's own GPU. Raises InputError when it cannot be traced."""
    shard.use_own_gpu()
    keep_freed_memory()  # every document asks for blocks of the same sizes again
    loaded, tokenizer = load_backbone(model)
    return adapter(loaded, public_name(model.path)), tokenizer


def trace_plan(
    backbone: Backbone,
    plan: Plan,
    trace: TraceConfig,
    out: Path,
    shard: Shard,
    max_failures: str,
    progress: Progress,
    say: Say,
) -> bool:
    """Trace the shard's documents of every side of `plan` into `out`/SIDE; finished ones are left as they are.

    A document that cannot be traced is written to `out`/failed.jsonl. Returns False when more failed than
    `max_failures` allows. Raises InputError when the settings do not fit the backbone or the stores there.
    """
    backbone.check(trace)
    stores = open_stores(backbone.info, plan, trace, out)
    todo: dict[Split, list[int]] = {
        side: [number for number in sorted(store.missing()) if shard.owns(number)] for side, store in stores.items()
    }
    rows = [plan.brief[side][number] for side, numbers in todo.items() for number in numbers]
    size = sum(expected_bytes(row["length"], row["rows"], backbone.info, trace) for row in rows)
    own = f" (shard {shard})" if shard.count > 1 else ""
    say(f"to trace{own}: {len(rows)} documents, {sum(row['length'] for row in rows)} tokens, "
        f"about {size / 2**20:.1f} MiB of traces in {out}")  # fmt: skip
    if shard.count == 1:
        for store in stores.values():
            store.sweep()
    else:
        failures.begin(out, shard)
    planned = sum(shard.owns(number) for documents in plan.brief.values() for number in range(len(documents)))
    failed = failures.Failures(out, shard, max_failures, planned)
    for side, store in stores.items():
        for number in progress(todo[side], f"tracing {side}"):
            if store.path(number).exists():  # by another worker, meanwhile
                continue
            reason = trace_document(backbone, plan, side, number, store, trace)
            if reason is not None and not failed.add(plan.brief[side][number]["document"], side, reason):
                say(str(failed))
                return False
    if failed.count:
        say(str(failed))
    finish(stores, out, say)
    return True


def open_stores(info: BackboneInfo, plan: Plan, trace: TraceConfig, out: Path) -> dict[Split, TraceStore]:
    """The store of each planned side, begun if there is none. Raises InputError when one holds other traces."""
    needles = {"needles": plan.settings["needles"]} if plan.settings["needles"] else {}
    return {
        side: TraceStore.create(
            out / side,
            Manifest(
                backbone=info,
                trace=trace,
                documents=plan.settings["documents"] | {"split": side} | needles,
                plan=plan.content(side),
                versions={name: version(name) for name in ("torch", "transformers")},
            ),
        )
        for side in plan.settings["sides"]
    }


def trace_document(
    backbone: Backbone, plan: Plan, side: Split, number: int, store: TraceStore, trace: TraceConfig
) -> str | None:
    """Trace one planned document into its store. Returns None, or in one line why it cannot be traced.

    What the disk says is no fault of the document: OSError is raised.
    """
    document = plan.document(side, number)
    traced = _trace_or_reason(backbone, document, trace)
    if isinstance(traced, str):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return traced
    tokens, spans, raw = traced
    meta = DocumentMeta(
        name=document.name,
        task=document.task,
        length=len(tokens),
        spans=spans,
        depth=document.depth,
        near_ties=raw.near_ties,
    )
    store.write(number, meta, raw)
    return None


def _trace_or_reason(
    backbone: Backbone, document: Document, trace: TraceConfig
) -> tuple[list[int], list[Span], RawTrace] | str:
    """What `_trace` returns, or why it cannot; whatever an error holds of the device is free once this has returned."""
    try:
        return _trace(backbone, document, trace)
    except OSError:
        raise
    except Exception as error:  # of a model's code or of memory that is too small, met at this document
        return one_line(error)


def _trace(backbone: Backbone, document: Document, trace: TraceConfig) -> tuple[list[int], list[Span], RawTrace]:
    """(tokens, spans of traced rows, trace) of the document itself, or of what the backbone makes of its prompt."""
    if not trace.own_tokens:
        raw = backbone.trace(document.tokens, torch.tensor(document.positions), trace)
        return document.tokens, document.spans, raw
    tokens, raw = backbone.trace_own(document.tokens[: document.prompt], trace)
    serve = max(0, document.prompt - 2 - int(raw.positions[0]))  # as in a document's own answer
    return tokens, [Span(first=0, last=len(raw.positions), serve=serve, tail=True)], raw


def finish(stores: dict[Split, TraceStore], out: Path, say: Say) -> None:
    """Say what every side has now; where that is all, leave nothing but the stores and the plan."""
    now = {side: TraceStore(store.root, store.manifest) for side, store in stores.items()}
    for side, store in now.items():
        missing = len(store.missing())
        say(f"{side}: {len(store)} documents in {store.root}" + (f", {missing} missing" if missing else ""))
    if any(store.missing() for store in now.values()):
        return
    failures.finish(out)
    for side, store in now.items():
        store.sweep()
        if ties := sum(document.meta.near_ties for document in store):
            say(f"{side}: {ties} cuts of the backbone's top-k between near-ties (tokens x layers)")


def expected_bytes(length: int, rows: int, info: BackboneInfo, trace: TraceConfig) -> int:
    """About how many bytes the trace of a document of `length` tokens and `rows` query tokens takes.

    Of the oracle the most that is kept: with `indexer` a guess, as nobody knows before how many chunks are golden.
    """
    recipe, chunks = KEY_RECIPES[info.key], length // trace.chunking.tokens
    keys = chunks * recipe.row(info.key_width) * recipe.dtype.itemsize
    kept = min(trace.top_chunks, chunks)
    entry = 4 + 4 * len(info.full_layers) if trace.oracle == "attention" else 8
    beside = 2 * chunks if info.key == "mean_pre_rope" else 0  # scores of the untrained baseline
    return len(trace.layers) * (rows * info.hidden * 2 + keys) + rows * (kept * entry + beside + 20)
