"""What whole documents of the two sides have in common is counted."""

import json

import pytest

from data_gen.config import DocumentsConfig
from data_gen.text.sources import measure_overlap

LICENCE = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. " * 2
OWN = [f"Text number {number} is about something of its own, " * 4 for number in range(5)]


def rows(kind, texts):
    if kind == "document":
        return [{"text": text} for text in texts]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts
    ]


@pytest.mark.parametrize("kind", ["document", "chat"])
def test_shared_paragraphs_are_counted(tmp_path, kind):
    texts = [f"{LICENCE}\n\n{OWN[0]}", OWN[1], OWN[1], f"{OWN[2]}\n\n{LICENCE.replace(' ', '  ')}", OWN[3], OWN[4]]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(kind, texts))))
    config = DocumentsConfig(source=str(path), tokens=(1, 2), train={kind: 2}, heldout={kind: 3})
    found = measure_overlap(config)
    held_out = [len(" ".join(text.split())) for text in (OWN[2], LICENCE, OWN[3], OWN[4])]
    assert (found.documents, found.sharing) == (3, 1) and found.share == pytest.approx(held_out[1] / sum(held_out))
    assert str(found).startswith("1 of 3 held-out documents share paragraphs with training ones (")
    assert measure_overlap(config.model_copy(update={"train": {}})).sharing == 0


def test_packed_text_shares_none():
    config = DocumentsConfig(source="nowhere", tokens=(1, 2), train={"text": 2}, heldout={"text": 3})
    assert measure_overlap(config).sharing == 0
