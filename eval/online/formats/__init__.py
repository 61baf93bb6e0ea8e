"""Published benchmarks in their own formats.

A format is a reader in `FORMATS`: a row -> its examples. Rows come from a .json, .jsonl or .parquet file, or from a
`datasets` name. Answers are scored by eval/online/scorers.py.
"""

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from eval.online.examples import Example
from eval.online.formats.kvpress import kvpress
from eval.online.formats.published import longbench, longmemeval, mrcr, ruler
from eval.online.formats.retrieval import babilong, graphwalks, helmet_kv, helmet_rag
from eval.online.formats.rows import FileRow, Reader, read_rows
from eval.online.formats.scbench import scbench

if TYPE_CHECKING:
    from eval.online.config import BenchmarkFile

FORMATS: dict[str, Reader] = {
    "ruler": ruler,
    "longbench-v2": longbench,
    "longmemeval": longmemeval,
    "mrcr": mrcr,
    "kvpress": kvpress,
    "scbench": scbench,
    "babilong": babilong,
    "graphwalks": graphwalks,
    "helmet-kv": helmet_kv,
    "helmet-rag": helmet_rag,
}


def read_benchmark(file: "BenchmarkFile", tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Every example of a file. Raises InputError for a file of another format, naming row and field."""
    name, read = "-".join(filter(None, [file.format, file.source, file.subset, file.split])), FORMATS[file.format]
    examples = [
        example
        for index, row in enumerate(read_rows(file))
        for example in read(row, f"{name}-{_digest(row)}-{index:05d}", tokenizer)
    ]
    if file.format == "mrcr":
        return examples  # each in the bin of its own length
    longest = max((example.length or 0 for example in examples), default=0)
    return [replace(example, length=longest or None) for example in examples]


def _digest(row: FileRow) -> str:
    """So that answers to a file that changed are not taken for answers to this one."""
    return hashlib.sha256(json.dumps(row.fields, sort_keys=True, default=str).encode()).hexdigest()[:8]
