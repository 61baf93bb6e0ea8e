"""Where text comes from, and what whole documents of the two sides have in common."""

import json
import re
from itertools import islice

import fsspec
import pytest
from datasets import Dataset

from data_gen.config import DocumentsConfig
from data_gen.core.errors import InputError
from data_gen.text.rows import Skipped
from data_gen.text.sources import SOURCES, documents_of, measure_overlap, read_source, whole_documents

LICENCE = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 2
OWN = [f"Text number {number} is about something of its own, " * 4 for number in range(24)]


def rows(kind, texts):
    if kind == "document":
        return [{"text": text} for text in texts]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts
    ]


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_shared_paragraphs_are_counted(tmp_path, kind):
    licensed = [f"{LICENCE}\n\n{own}" for own in OWN[:12]] + [
        f"{own}\n\n{LICENCE.replace(' ', '  ')}" for own in OWN[:12]
    ]
    path = tmp_path / "texts.jsonl"
    config = DocumentsConfig(source=str(path), tokens=(1, 2), train={kind: 2}, heldout={kind: 3}, heldout_share=0.5)

    def sides(texts):
        path.write_text("\n".join(map(json.dumps, rows(kind, texts))))
        found = [whole_documents(documents_of(config), config, held_out) for held_out in (False, True)]
        return [[one if kind == "document" else one[0]["content"] for one in side] for side in found]

    (trained, *_), (asked, *_) = sides(licensed)
    plain_trained, plain_asked = sides(OWN[12:])
    texts = [trained, plain_trained[0], plain_trained[0], asked, *plain_asked[:2]]
    sides(texts)
    found = measure_overlap(config)
    own = next(part for part in asked.split("\n\n") if part.startswith("Text"))
    held_out = [len(" ".join(text.split())) for text in (own, LICENCE, *plain_asked[:2])]
    assert (found.documents, found.sharing) == (3, 1) and found.share == pytest.approx(held_out[1] / sum(held_out))
    assert str(found).startswith("1 of 3 held-out documents share paragraphs with training ones (")
    assert measure_overlap(config.model_copy(update={"train": {}})).sharing == 0


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_no_row_on_top_moves_a_document_to_the_other_side(tmp_path, kind):
    path = tmp_path / "texts.jsonl"
    config = DocumentsConfig(source=str(path), tokens=(1, 2), train={kind: 6}, heldout={kind: 2})

    def sides(texts):
        path.write_text("\n".join(map(json.dumps, rows(kind, texts))))
        found = [whole_documents(documents_of(config), config, held_out) for held_out in (False, True)]
        return [{" ".join(json.dumps(one).split()) for one in side} for side in found]

    texts = [f"Text number {number}, which nobody else has. " * 4 for number in range(200)]
    before = sides(texts)
    assert sum(map(len, before)) == 200 and 25 < len(before[1]) < 75
    after = sides(["A row on top of all others. " * 9, texts[7].replace(" ", "  "), *reversed(texts)])
    assert sum(map(len, after)) == 201 and all(one <= other for one, other in zip(before, after, strict=True))


def test_packed_text_shares_none():
    config = DocumentsConfig(source="nowhere", tokens=(1, 2), train={"text": 2}, heldout={"text": 3})
    assert measure_overlap(config).sharing == 0


def text_file(folder, suffix):
    """A source of that kind with two documents, as its name."""
    texts = ["the first text", "the second text"]
    if suffix == "folder":
        for number, text in enumerate(texts):
            (folder / f"{number}.md").write_text(text)
        return folder
    if suffix == "glob":
        for number, text in enumerate(texts):
            (folder / f"{number}.jsonl").write_text(json.dumps({"text": text}))
        return folder / "?.jsonl"
    if suffix == "address":
        with fsspec.open_files([f"memory://{folder.name}/{number}.jsonl" for number in range(2)], "w") as files:
            for file, text in zip(files, texts, strict=True):
                file.write(json.dumps({"text": text}))
        return f"memory://{folder.name}/*.jsonl"
    path = folder / f"texts.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif suffix == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


OFFLINE = ("builtin", "stdlib", "package", "address", "folder", "glob", "jsonl", "json", "parquet")
"""Kinds that read something without a network; `other` and `datasets` refuse what is missing."""


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_reads_or_refuses(kind, tmp_path):
    if kind in ("builtin", "stdlib", "package"):
        source = "package:typer" if kind == "package" else kind
        assert all(len(text) > 20 for text in islice(read_source(source, "text"), 3))
    elif kind in OFFLINE:
        assert list(read_source(str(text_file(tmp_path, kind)), "text")) == ["the first text", "the second text"]
    else:
        with pytest.raises(InputError, match=r"^documents \S+: no such file or folder"):
            next(read_source("./nothing-here" if kind == "other" else "nobody/nothing-here", "text"))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_bad_line_at_an_address_is_skipped_as_in_a_file_here(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("data_gen.text.rows.LARGEST_ROW", 1000)
    lines = [json.dumps({"text": text}) for text in ("one", "cut short", "long " * 300, "two")]
    lines[1] = lines[1][:-1]
    address = f"memory://{tmp_path.name}/texts.{suffix}"
    with fsspec.open(address, "wb", compression="infer") as file:
        file.write("\n".join(lines).encode())
    skipped = Skipped()
    assert list(read_source(address, "text", skipped)) == ["one", "two"] and skipped.count == 2
    assert re.match(rf"documents memory:///?{tmp_path.name}/texts.{suffix} line 2: not JSON", skipped.reasons[0])
    with pytest.raises(InputError, match="line 2: not JSON in UTF-8"):
        list(read_source(address, "text"))
    with pytest.raises(InputError, match=r"documents nothing://here\.jsonl: cannot be read"):
        list(read_source("nothing://here.jsonl", "text"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_an_address_is_read_by_its_ending(tmp_path, suffix):
    path = text_file(tmp_path, suffix)
    assert list(read_source(f"file://{path}", "text")) == ["the first text", "the second text"]
    with pytest.raises(InputError, match=rf"file://{path}x: expected an address that ends in .jsonl"):
        list(read_source(f"file://{path}x", "text"))
    path.unlink()
    with pytest.raises(InputError, match=rf"file://{path}: cannot be read after (row|line) 0"):
        list(read_source(f"file://{path}", "text"))
