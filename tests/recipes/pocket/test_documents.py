"""Chats to trace and tests to ask: what tracing and the benchmark take for granted of them."""

import json

from recipes.pocket.documents import ASKED, write_chats, write_questions, write_texts
from recipes.pocket.words import build_lexicon


def rows_of(path):
    return [json.loads(line) for line in path.open()]


def test_chats_end_with_an_answer_and_alternate(shipped, tmp_path):
    write_chats(shipped, tmp_path / "chats.jsonl", 6, (512, 1024))
    chats = [row["messages"] for row in rows_of(tmp_path / "chats.jsonl")]
    answers = {*(lexicon := build_lexicon(shipped.vocabulary)).values, *lexicon.keys, *lexicon.ordinals}
    assert len(chats) == 6
    for messages in chats:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        questions, replies = messages[::2], messages[1::2]
        assert all(message["content"].split()[-1] == "?" for message in questions)
        assert all(set(message["content"].split()) <= answers for message in replies)
        assert 300 < sum(len(message["content"].split()) for message in messages) <= 1024
    assert chats[0] != chats[1]


def test_questions_on_one_text_begin_alike_and_are_answered_in_it(shipped, tmp_path):
    write_questions(shipped, tmp_path, "report", 512, 3)
    tests = {task: rows_of(tmp_path / "report" / f"{task}-512.jsonl") for task in ASKED}
    texts = []
    for index in range(3):
        rows = [tests[task][index] for task in ASKED]
        bodies = {row["input"].rpartition(" . ")[0] for row in rows}
        assert len(bodies) == 1 and len({row["input"] for row in rows}) == len(ASKED)
        texts.append(*bodies)
        for task, row in zip(ASKED, rows, strict=True):
            assert (row["index"], row["length"]) == (index, 512)
            answers = [word for output in row["outputs"] for word in output.split()]
            assert answers and set(answers) <= set(texts[-1].split())
            assert len(row["outputs"]) == (3 if task == "multi_value" else 1)
        words = [len(row["input"].split()) + len(" ".join(row["outputs"]).split()) for row in rows]
        assert 500 < max(words) < 512
    assert len(set(texts)) == 3


def test_no_word_is_asked_about_on_both_sides(shipped, tmp_path):
    asked = {}
    lexicon = build_lexicon(shipped.vocabulary)
    for side in ("development", "report"):
        write_questions(shipped, tmp_path, side, 512, 5)
        inputs = [row["input"] for task in ASKED for row in rows_of(tmp_path / side / f"{task}-512.jsonl")]
        asked[side] = {word for text in inputs for word in text.split()} & {*lexicon.keys, *lexicon.names}
        assert len(asked[side]) > 20
    assert not asked["development"] & asked["report"]


def test_texts_hold_questions_and_are_no_chats(shipped, tmp_path):
    write_texts(shipped, tmp_path / "text.jsonl", 2)
    write_chats(shipped, tmp_path / "chats.jsonl", 2, (512, 1024))
    texts = [row["text"].split() for row in rows_of(tmp_path / "text.jsonl")]
    chats = [" ".join(m["content"] for m in row["messages"]) for row in rows_of(tmp_path / "chats.jsonl")]
    assert texts[0] != texts[1] and all(1400 < len(text) <= 2048 and "?" in text[-64:] for text in texts)
    assert not any(" ".join(text[:100]) in chat for text in texts for chat in chats)
