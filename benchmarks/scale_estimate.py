"""What many documents will take, from the settings of two recipes or from documents that were traced: a part of
benchmarks/scale.py."""

from pathlib import Path
from typing import Any

from data_gen.core.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.generate import expected_bytes
from data_gen.text.plan import Plan
from data_gen.traces.progress import PLAN, progress_of
from data_gen.traces.store import TraceStore, number_of
from data_gen.traces.types import BackboneInfo
from recipes import load_recipe

LINK = 10e9 / 8
"""Bytes a second of a network of 10 Gbit/s."""


def estimate(documents: int, tokens: int, ratio: float, out: Path | None) -> list[dict[str, Any]]:
    """What so many documents take. ratio: bytes read over bytes needed by an epoch; out: a plan with traces, which one
    worker made; None: of DeepSeek-V4-Flash as its recipe traces it, and of a small dense model."""
    if out is None:
        dense = BackboneInfo("gemma3_text", "", [5, 11, 17], 640, 256, tokens)
        flash, gemma = (load_recipe(name).trace for name in ("deepseek-v4-flash", "gemma-3-270m"))
        rows = [
            {
                "model": name,
                "query_tokens": trace.text_rows,
                "bytes": expected_bytes(tokens, trace.text_rows, info, trace),
            }
            for name, info, trace in (("DeepSeek-V4-Flash", V4_FLASH, flash), ("Gemma 3 270M", dense, gemma))
        ]
    else:
        rows = [traced(out, tokens)]
    for row in rows:
        row |= {"documents": documents, "tokens": tokens, "terabytes": documents * row["bytes"] / 1e12}
        row |= {"hours_copying": documents * row["bytes"] / LINK / 3600}
        row |= {"hours_reading": ratio * row["hours_copying"]}
        if out is not None:
            row["hours_tracing"] = documents * tokens / row["tokens_a_second"] / 3600
    return rows


def traced(out: Path, tokens: int) -> dict[str, Any]:
    """What the traces in `out` say of a document of `tokens` tokens: its bytes, as many times those that its settings
    lead to expect as theirs were, and the tokens a second at which they were traced. Raises InputError before
    two are."""
    now, plan, expected, lengths, queries = progress_of(out), Plan(out / PLAN), 0, [], []
    if now.rate is None:
        raise InputError(f"{out}: too few traces to tell how fast they are made; trace two or more documents")
    for side in (side for side in plan.settings["sides"] if any((out / side).glob("*/doc_*"))):
        store = TraceStore.open(out / side, partial=True)
        info, trace = store.manifest.backbone, store.manifest.trace
        for row in (plan.brief[side][number_of(path)] for path in store.paths()):
            expected += expected_bytes(row["length"], row["rows"], info, trace)
            lengths.append(row["length"])
            queries.append(row["rows"])
    rows = round(sum(queries) / len(queries))
    return {
        "model": info.name or info.model_type,
        "query_tokens": rows,
        "bytes": now.bytes / expected * expected_bytes(tokens, rows, info, trace),
        "traced": len(lengths),
        "traced_tokens": sum(lengths) / len(lengths),
        "of_expected": now.bytes / expected,
        "tokens_a_second": now.rate,
    }
