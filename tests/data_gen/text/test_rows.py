"""Rows as people have them: compressed, in lists, in several files, with parts and tool calls, damaged."""

import copy
import gzip
import json
import time
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from data_gen.backbones.dense import DenseBackbone
from data_gen.config import DocumentsConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.generate import generate
from data_gen.text.documents import draw_documents
from data_gen.text.plan import Plan
from data_gen.text.rows import LARGEST_ROW, Skipped
from data_gen.text.sources import measure_overlap, read_source
from tests.conftest import tiny_model

TEXTS = ["the first text", "the second text"]
LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
ASKS, ANSWERS = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def written(folder, name, data):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return str(path)


def chat_file(folder, *rows):
    return written(folder, "chats.jsonl", "\n".join(map(json.dumps, rows)).encode())


def test_compressed_lines_and_lists(tmp_path):
    assert list(read_source(written(tmp_path, "a.jsonl.gz", gzip.compress(LINES)), "text")) == TEXTS
    rows = json.dumps([{"text": text} for text in TEXTS]).encode()
    assert list(read_source(written(tmp_path, "a.json", rows), "text")) == TEXTS
    whole = gzip.compress(LINES)
    other = bytes([*whole[:-8], whole[-8] ^ 1, *whole[-7:]])  # its checksum is another text's
    for damaged in (whole[:-9], whole[:-1], other, b"no gzip", whole[:20] + b"\xff" * 30):
        with pytest.raises(InputError, match=r"b\.jsonl\.gz: cannot be read after line 0") as caught:
            next(read_source(written(tmp_path, "b.jsonl.gz", damaged), "text"))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"c\.json: holds no list of rows"):
        list(read_source(written(tmp_path, "c.json", b'{"text": "x"}'), "text"))


def test_zstandard_is_read_where_it_is_installed(tmp_path):
    try:
        import zstandard
    except ImportError:
        with pytest.raises(InputError, match="needs the package zstandard"):
            list(read_source(written(tmp_path, "a.jsonl.zst", b""), "text"))
    else:
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(LINES)
        assert list(read_source(written(tmp_path, "a.jsonl.zst", whole), "text")) == TEXTS
        two = zstandard.compress(LINES[:9]) + zstandard.compress(LINES[9:])
        assert list(read_source(written(tmp_path, "a.jsonl.zst", two), "text")) == TEXTS  # as `pzstd` and `cat` write
        for damaged in (whole[:-5], whole[:-1], bytes([*whole[:-1], whole[-1] ^ 1]), two[:-3], b"no zst", b""):
            with pytest.raises(InputError, match=r"b\.jsonl\.zst: cannot be read after line 0"):
                next(read_source(written(tmp_path, "b.jsonl.zst", damaged), "text"))


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert list(read_source(written(tmp_path, "a.jsonl", mark + LINES), "text")) == TEXTS
    joined = mark + LINES + b"\n" + mark + LINES  # of two files
    assert list(read_source(written(tmp_path, "a.jsonl", joined), "text")) == TEXTS + TEXTS
    rows = json.dumps([{"text": text} for text in TEXTS]).encode()
    assert list(read_source(written(tmp_path, "a.json", mark + rows), "text")) == TEXTS
    written(tmp_path / "texts", "a.txt", mark + TEXTS[0].encode())
    assert list(read_source(str(tmp_path / "texts"), "text")) == TEXTS[:1]


def test_what_is_no_source_is_told_what_would_be(tmp_path):
    with pytest.raises(InputError, match=r"a\.csv: expected a folder of texts, \.jsonl, \.jsonl\.gz, .*\.parquet"):
        list(read_source(written(tmp_path, "a.csv", b"a,b"), "text"))


def test_several_files_and_globs_are_read_in_order(tmp_path):
    names = [written(tmp_path, f"{name}.jsonl", json.dumps({"text": name}).encode()) for name in ("b", "a", "c[1]")]
    assert list(read_source(names, "text")) == ["b", "a", "c[1]"]
    assert list(read_source(str(tmp_path / "*.jsonl"), "text")) == ["a", "b", "c[1]"]
    with pytest.raises(InputError, match="no file has such a name"):
        list(read_source(str(tmp_path / "*.json"), "text"))


def test_a_data_set_folder_by_subset_and_split(tmp_path):
    for subset, split in (("one", "train"), ("two", "train"), ("two", "validation")):
        (tmp_path / subset).mkdir(exist_ok=True)
        Dataset.from_dict({"text": [f"{subset} {split}"]}).to_parquet(tmp_path / subset / f"{split}.parquet")
    configs = "\n".join(
        f"- config_name: {name}\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: {name}/{split}.parquet\n" for split in splits
        ) for name, splits in (("one", ["train"]), ("two", ["train", "validation"]))
    )  # fmt: skip
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert list(read_source(f"{tmp_path}:one", "text")) == ["one train"]
    assert list(read_source(f"{tmp_path}:two:validation", "text")) == ["two validation"]
    for source in (f"{tmp_path}:three", f"{tmp_path}:one:test", f"{tmp_path}:one:train:more"):
        with pytest.raises(InputError, match=f"documents {source}: ") as caught:
            list(read_source(source, "text"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["json", "text", "csv", "parquet"])
def test_the_name_of_a_format_does_not_read_the_working_directory(tmp_path, monkeypatch, name):
    written(tmp_path, "secret.json", LINES)
    written(tmp_path, "secret.txt", b"text\n")
    written(tmp_path, "secret.csv", b"text\nx\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"documents {name}: the name of a format"):
        list(read_source(name, "text"))


def test_parts_tool_calls_and_null_texts_are_read(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    parts = ASKS | {"content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}
    path = chat_file(tmp_path, {"text": None, "messages": [ASKS, ANSWERS]}, {"messages": [parts, call, ANSWERS]})
    assert list(read_source(path, "text")) == [[ASKS, ANSWERS], [ASKS, call | {"content": ""}, ANSWERS]]


BAD_LINES = {
    "an integer of 5,000 digits": (b'{"text": %s}' % (b"7" * 5000), "not JSON that can be read"),
    "nesting without end": (b"[" * 100_000, "not JSON"),
    "half a surrogate pair": (rb'{"text": "a \ud83d b"}', "surrogate"),
    "half a surrogate pair in a chat": (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "surrogate"),
    "bytes that are not UTF-8": (b'{"text": "\xff"}', "not JSON in UTF-8"),
    "a picture": (b'{"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}', "needs a text"),
    "no content": (b'{"messages": [{"role": "user", "content": null}]}', "needs a text"),
    "a number": (b"7", "needs a text"),
    "nothing": (b'{"text": " "}', "an empty document"),
    "no messages": (b'{"messages": []}', "an empty document"),
    "a row of 30 MB": (b'{"text": "%s"}' % (b"word " * 6_000_000), "a row of more than 16 MiB"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_row_stops_or_is_skipped_as_the_recipe_says(tmp_path, bad):
    line, reason = BAD_LINES[bad]
    path = written(tmp_path, "a.jsonl", LINES.replace(b"\n", b"\n" + line + b"\n"))
    began = time.perf_counter()
    with pytest.raises(InputError, match=rf"^documents {path} line 2: .*{reason}") as caught:
        list(read_source(path, "text"))
    assert "\n" not in str(caught.value)
    skipped = Skipped()
    assert list(read_source(path, "text", skipped)) == TEXTS
    assert skipped.count == 1 and str(skipped) == f"1 bad rows skipped: {caught.value}"
    assert time.perf_counter() - began < 5 and LARGEST_ROW == 16 << 20


def test_what_was_skipped_is_said_and_changes_nothing_else(tmp_path, tokenizer):
    good = [json.dumps({"text": f"{number} " * 60}) for number in range(3)]
    clean, dirty = (written(tmp_path, name, "\n".join(rows).encode()) for name, rows in (
        ("clean.jsonl", good), ("dirty.jsonl", ["{", "7", good[0], "[]", good[1], "{}", "8", good[2]])))  # fmt: skip
    trace = TraceConfig(chunking=Chunking(tokens=4, sink=0, recent=0), layers=[0], window=8, text_rows=8)

    def traced(source, **more):
        config = DocumentsConfig(source=source, tokens=(1, 2), train={"document": 2}, heldout={"document": 1}, **more)
        out = tmp_path / f"{Path(source).stem}-{len(more)}"
        generate(DenseBackbone(tiny_model("llama")), tokenizer, config, trace, out)
        traced = [load_file(path) for path in sorted(out.rglob("doc_*"))]
        return Plan(out / "plan.parquet").notes, [{name: each[name].tolist() for name in each} for each in traced]

    lines, files = traced(dirty, bad_rows="skip")
    assert lines[0].startswith(f"train: 3 bad rows skipped: documents {dirty} line 1: not JSON in UTF-8; ")
    assert lines[1].startswith("heldout: 5 bad rows skipped: ") and lines[1].endswith(" ...")
    assert traced(clean)[1] == files and len(files) == 3
    with pytest.raises(InputError, match="line 1: not JSON"):
        traced(dirty)


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_what_makes_no_document_is_skipped_and_the_next_one_is_drawn(tmp_path, tokenizer, tiny_recipe, kind):
    """As if the source had held the others alone, whose number and order decide nothing else."""

    def row(text, *more):
        return {"text": text} if kind == "document" else {"messages": [ASKS | {"content": text}, ANSWERS, *more]}

    good = [row(f"{number} is asked about here. " * 9) for number in range(30)]
    bad = [row("too long " * 80)]
    if kind == "chat":
        bad += [row(good[0]["messages"][0]["content"], ASKS), {"text": "a text that is no chat " * 9}]
    else:
        bad += [row("too short"), {"messages": [ASKS, ANSWERS]}]
    mixed = [each for number, one in enumerate(good) for each in (*bad[number : number + 1], one)]

    def drawn(name, rows, bad_rows):
        source = written(tmp_path, name, "\n".join(map(json.dumps, rows)).encode())
        asked = {"source": source, "train": {kind: 6}, "heldout": {kind: 3}, "heldout_share": 0.4, "bad_rows": bad_rows}
        documents, unfit = tiny_recipe.documents.model_copy(update=asked), set()
        found = []
        for side in ("train", "heldout"):
            skipped = Skipped()
            given = documents, tiny_recipe.trace, tokenizer, 512, side, skipped
            found += [(each.name, each.tokens, each.spans) for each in draw_documents(*given)]
            unfit |= skipped.unfit
        return found, len(unfit), measure_overlap(documents, unfit)

    expected, none, overlap = drawn("clean.jsonl", good, "stop")
    found, unfit, same = drawn("mixed.jsonl", mixed, "skip")
    assert found == expected and len(found) == 9 and (none, unfit) == (0, len(bad)) and same == overlap
    with pytest.raises(InputError):
        drawn("mixed.jsonl", mixed, "stop")


TEMPLATES = {
    "text and none": "{{ 'a' + none }}",
    "a division by zero": "{{ 1 / 0 }}",
    "no such attribute": "{{ messages.nothing.at.all }}",
    "no template": "{% for %}",
    "a dictionary without a default": {"rag": "x"},
    "no end": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_that_fails_is_one_line(tmp_path, tokenizer, what):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = TEMPLATES[what]
    config = DocumentsConfig(
        source=chat_file(tmp_path, {"messages": [ASKS, ANSWERS]}), tokens=(1, 2), train={"chat": 1}, heldout={}
    )
    where = r"documents .*chats\.jsonl: train-chat-0000000: the model's chat template refuses the messages"
    with pytest.raises(InputError, match=where) as caught:
        list(draw_documents(config, TraceConfig(layers=[0]), broken, 512, "train"))
    assert "\n" not in str(caught.value)


def test_a_source_that_was_skipped_to_its_end_says_why(tmp_path, tokenizer):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = TEMPLATES["a division by zero"]
    rows = [{"messages": [ASKS | {"content": f"question {number}"}, ANSWERS]} for number in range(4)]
    source = written(tmp_path, "chats.jsonl", "\n".join(map(json.dumps, rows)).encode())
    config = DocumentsConfig(source=source, tokens=(1, 2), train={"chat": 2}, heldout={}, bad_rows="skip")
    why = (
        r"no document is left for train-chat-0000000 .*; 4 bad rows skipped: .* refuses the messages \(division by zero"
    )
    with pytest.raises(InputError, match=why):
        list(draw_documents(config, TraceConfig(layers=[0]), broken, 512, "train"))


def test_tool_calls_need_a_template(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    config = DocumentsConfig(
        source=chat_file(tmp_path, {"messages": [ASKS, call, ANSWERS]}), tokens=(1, 2), train={"chat": 1}, heldout={}
    )
    with pytest.raises(InputError, match="need a chat template"):
        list(draw_documents(config, TraceConfig(layers=[0]), bare, 512, "train"))


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_text_beyond_the_context_is_not_tokenised_whole(tmp_path, tokenizer, kind, monkeypatch):
    text = "word " * 200_000
    row = {"text": text} if kind == "document" else {"messages": [ASKS | {"content": text}, ANSWERS]}
    longest, call = [0], type(tokenizer).__call__

    def watched(self, given, **more):
        longest[0] = max(longest[0], len(given))
        return call(self, given, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    config = DocumentsConfig(source=chat_file(tmp_path, row), tokens=(1, 2), train={kind: 1}, heldout={})
    with pytest.raises(InputError, match=r"the first 8192 alone are 8192 tokens, .* context is 512"):
        list(draw_documents(config, TraceConfig(layers=[0]), tokenizer, 512, "train"))
    assert longest[0] == 8192
