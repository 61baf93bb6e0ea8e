"""Rows of decode and benchmark that the report's tests are about."""

from eval.online.records import Record
from eval.online.summary import accuracy_rows, depth_rows, fidelity_rows

DECODE = [
    {"policy": policy, "correct": correct, "examples": 10, "low": correct / 10 - 0.1, "high": correct / 10 + 0.1,
     "agreement": 0.9, "kl": 0.1, "texts": 1, "chunks": 20.0, "kv_share": share, "kv_mb": 60 * share, "refreshes": 3}
    for policy, correct, share in (("full", 8, 1.0), ("indexer", 7, 0.2), ("random", 2, 0.2))
]  # fmt: skip

RUNS = [
    {"policy": policy, "budget": budget, "kept": kept, "kv_bytes": 1e7 * kept, "chunks": 9.0, "refreshes": 1,
     "score": score}
    for policy, budget, kept, score in (("full", None, 1.0, 1.0), ("indexer", 0.1, 0.15, 0.5), ("random", 0.1, 0.2, 0))
]  # fmt: skip
RECORDS = [
    Record.model_validate(
        {"name": f"{depth}-{length}", "benchmark": "needles", "task": "single", "length": length, "tokens": length,
         "depth": depth, "left_out": "", "runs": RUNS}
    )
    for depth in (0.1, 0.5, 0.9) for length in (500, 1000)
]  # fmt: skip
BENCHMARK = {
    "benchmark": [row.model_dump() for row in accuracy_rows(RECORDS, 500)],
    "benchmark_depth": [row.model_dump() for row in depth_rows(RECORDS)],
}
FOLLOWED = [
    {name: run[name] for name in run if name != "score"} | {"agreement": 0.9, "kl": 0.05, "loss": 2.0} for run in RUNS
]
TEXTS = [
    Record.model_validate(
        {"name": str(number), "benchmark": "text", "task": "text", "length": 500, "tokens": 500, "depth": None,
         "left_out": "", "runs": FOLLOWED}
    )
    for number in range(3)
]  # fmt: skip
TEXT = {"benchmark_text": [row.model_dump() for row in fidelity_rows(TEXTS, 500)]}
