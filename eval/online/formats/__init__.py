"""Published benchmarks in their own formats.

A format is a reader in `FORMATS`: a row -> its examples. Rows come from a .json, .jsonl or .parquet file, or from a
`datasets` name (rows.py). Answers are scored by eval/online/scorers.py.
"""

FORMATS = {
    "ruler": "eval.online.formats.published:ruler",
    "longbench-v2": "eval.online.formats.published:longbench",
    "longmemeval": "eval.online.formats.published:longmemeval",
    "mrcr": "eval.online.formats.published:mrcr",
    "kvpress": "eval.online.formats.kvpress:kvpress",
    "scbench": "eval.online.formats.scbench:scbench",
    "babilong": "eval.online.formats.retrieval:babilong",
    "graphwalks": "eval.online.formats.retrieval:graphwalks",
    "helmet-kv": "eval.online.formats.retrieval:helmet_kv",
    "helmet-rag": "eval.online.formats.retrieval:helmet_rag",
}
"""Where each format's reader is: settings and the command's help know every name without loading one."""
