"""What is fuzzed, whole: a tiny model, texts in every format, and all that the verbs make of them."""

import contextlib
import gzip
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zstandard

from data_gen.flashmemory.document import V4_FLASH
from indexer_train.formats.flashmemory import write_checkpoint
from indexer_train.formats.weights import LayerWeights
from tests.conftest import tiny_model, tiny_tokenizer
from tests.data_gen.flashmemory.test_import import TRACE, dump, save
from tests.fuzz.calls import call

ENOUGH = 600
"""Seconds for a verb on whole input, on however busy a machine."""
PACKED = {"train": {"text": 3, "single": 2}, "heldout": {"text": 1, "multi_value": 1}}
SOURCES: dict[str, dict[str, Any]] = {
    "texts.jsonl": PACKED,
    "texts.jsonl.gz": PACKED,
    "texts.jsonl.zst": PACKED,
    "texts.json": PACKED,
    "texts.parquet": PACKED,
    "texts": PACKED,
    "whole.jsonl": {"train": {"document": 3}, "heldout": {"document": 2}, "heldout_share": 0.4},
    "chats.jsonl": {"train": {"chat": 3}, "heldout": {"chat": 2}, "heldout_share": 0.4, "bad_rows": "skip"},
}
"""Files of documents, and what recipes ask of them."""


@dataclass(frozen=True)
class World:
    """A folder with all of it, which verbs are called in.

    model/, and what SOURCES names; recipes/NAME.yaml: one for each source, `hard` and `import`; begun/NAME/: traces of
    each source; run/: traces, checkpoints, indexer, bundle; half/: the same run before its end; mined/: traces with
    hard negatives; release.pt, release.safetensors: checkpoints of the release; dumps/: its traces.
    """

    root: Path

    def lay_out(self, folder: Path, *copied: str) -> Path:
        """A folder like it in which all that is `copied` may be changed; returns where the first of them lies."""
        _lay_out(self.root, folder, [Path(path).parts for path in copied])
        return folder / copied[0]


def _lay_out(origin: Path, folder: Path, copied: list[tuple[str, ...]]) -> None:
    folder.mkdir()
    for entry in origin.iterdir():
        below = [path[1:] for path in copied if path[0] == entry.name]
        if not below:
            (folder / entry.name).symlink_to(entry)
        elif () not in below:
            _lay_out(entry, folder / entry.name, below)
        elif entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copyfile(entry, folder / entry.name)


def recipe(name: str) -> str:
    """The path of a recipe in a world."""
    return f"recipes/{name}.yaml"


def settings(source: str, asked: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one-character tokens that takes seconds."""
    return {
        "backbone": {"path": "model"},
        "documents": {"source": source, "tokens": [420, 450], **asked},
        "trace": {
            "chunking": {"tokens": 4, "sink": 1, "recent": 2},
            "layers": [0, 2],
            "window": 16,
            "text_rows": 32,
            "answer_lead": 8,
            "tail": 4,
        },
        "indexer": {"heads": 2, "rank": 4, "distance_bumps": 2},
        "train": {"epochs": 2, "windows_per_document": 8, "validation_every": 4, "eval_epochs": 1},
        "decode": {"answer_tokens": 2, "text_documents": 1, "text_tokens": 20},
        "benchmark": {},
    }


def build(root: Path) -> World:
    """Make it all in the folder `root`, with the verbs themselves."""
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    _write_sources(root)
    _write_release(root)
    _write_recipes(root)
    with contextlib.chdir(root):
        _run_verbs()
    return World(root)


def _write_recipes(root: Path) -> None:
    recipes = {name: settings(name, asked) for name, asked in SOURCES.items()}
    hard = settings("texts.jsonl", PACKED)
    hard["train"] |= {"loss": "focal", "candidates": {"kind": "sampled", "source": "hard"}}
    recipes |= {"hard": hard, "import": hard | {"trace": TRACE.model_dump(mode="json")}}
    (root / "recipes").mkdir()
    for name, content in recipes.items():
        (root / recipe(name)).write_text(yaml.safe_dump(content))


def _run_verbs() -> None:
    first, traces = recipe("texts.jsonl"), "run/traces/train"
    for name in SOURCES:
        _must("generate", recipe(name), "--out", f"begun/{name}")
    _must("generate", first, "--out", "run/traces")
    _must("train", first, "--traces", traces, "--out", "run")
    _must("export", "--indexer", "run/indexer", "--out", "run/bundle")
    shutil.copytree("run", "half", ignore=shutil.ignore_patterns("traces", "indexer", "bundle"))
    shutil.copytree("run/traces/train", "mined")
    _must("mine", first, "--indexer", "run/indexer", "--traces", "mined", "--count", "8")


def _must(*arguments: str) -> None:
    outcome = call(arguments, ENOUGH)
    if outcome.code or outcome.fault:
        raise RuntimeError(f"{arguments}: {outcome.fault or outcome.reason}")


def _texts(count: int, words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(200)]
    return ["\n\n".join(" ".join(rng.choices(vocabulary, k=words)) for _ in range(3)) for _ in range(count)]


def _write_sources(root: Path) -> None:
    packed = [{"text": text} for text in _texts(24, 28, seed=1)]
    whole = [{"text": text} for text in _texts(12, 17, seed=2)]
    questions, answers = _texts(12, 12, seed=3), _texts(12, 3, seed=4)
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(questions, answers, strict=True)
    ]
    lines = {name: "".join(f"{json.dumps(row)}\n" for row in rows).encode()
             for name, rows in (("texts", packed), ("whole", whole), ("chats", chats))}  # fmt: skip
    for name, content in lines.items():
        (root / f"{name}.jsonl").write_bytes(content)
    (root / "texts.jsonl.gz").write_bytes(gzip.compress(lines["texts"], mtime=0))
    (root / "texts.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(lines["texts"]))
    (root / "texts.json").write_text(json.dumps(packed))
    pq.write_table(pa.Table.from_pylist(packed), root / "texts.parquet")
    (root / "texts").mkdir()
    for number, row in enumerate(packed):
        (root / "texts" / f"{number:02d}.txt").write_text(row["text"])


def _write_release(root: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = [(8, V4_FLASH.hidden), (8,), (4 * V4_FLASH.key_width, 8), (4, V4_FLASH.hidden)]
    weights = {
        layer: LayerWeights(*(torch.randn(shape, generator=generator) for shape in shapes)) for layer in (10, 12)
    }
    assert V4_FLASH.rope is not None
    rope = V4_FLASH.rope.model_copy(update={"positions": 64})
    write_checkpoint(weights, rope, root / "release.pt", "flashmemory-joint")
    write_checkpoint(weights, rope, root / "release.safetensors", "flashmemory-safetensors")
    for number in range(2):
        save(root / "dumps", number, dump(seed=number))
    (root / "dumps" / "doc_00001.json").write_text('{"prompt": "a", "response": "b", "rid": "c"}')
    (root / "dumps" / "server_metadata.jsonl").write_text('{"filename": "doc_00001.pkl", "doc_index": 1, "rid": "c"}\n')
