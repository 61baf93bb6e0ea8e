"""Small files in the published formats, written for these tests; and files that are something else."""

import json
from typing import get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import cli
from data_gen.core.errors import InputError
from eval.online.config import BenchmarkFile
from eval.online.formats import FORMATS
from eval.online.formats.rows import read_benchmark
from eval.online.scorers import SCORERS
from tests.eval.online.suites import SUITES

RULER = {
    "index": 0,
    "input": "A special magic number is hidden. The grass is green. It is 8231. What is the special magic number?",
    "outputs": ["8231"],
    "length": 4012,
    "length_w_model_temp": 4012,
    "answer_prefix": " The special magic number is",
    "token_position_answer": 12,
}
LONGBENCH = {
    "_id": "66f36490821e116aacb2cc22",
    "domain": "Single-Document QA",
    "sub_domain": "Financial",
    "difficulty": "easy",
    "length": "short",
    "question": "How many boats?",
    "choice_A": "One",
    "choice_B": "Two",
    "choice_C": "Three",
    "choice_D": "Four",
    "answer": "C",
    "context": "There are three boats.",
}
LONGMEMEVAL = {
    "question_id": "e47becba",
    "question_type": "single-session-user",
    "question": "What did I paint?",
    "answer": "The old fence",
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/22 (Mon) 10:00"],
    "haystack_session_ids": ["s1", "answer_s2"],
    "answer_session_ids": ["answer_s2"],
    "haystack_sessions": [
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, how are you?"}],
        [{"role": "user", "content": "I painted the old fence.", "has_answer": True}],
    ],
}
CHAT = [
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "Snouts."},
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "More snouts."},
    {"role": "user", "content": "Prepend aYooSG8CQg to the 2nd (1 indexed) poem about tapirs."},
]
MRCR = {
    "prompt": json.dumps(CHAT),
    "answer": "aYooSG8CQgMore snouts.",
    "random_string_to_prepend": "aYooSG8CQg",
    "n_needles": 2,
    "desired_msg_index": 3,
    "total_messages": 6,
    "n_chars": 200,
    "date_added": "04-12-2025",
}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(path, kind, tokenizer, **options):
    return read_benchmark(BenchmarkFile(format=kind, source=str(path), **options), tokenizer)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_ruler(tmp_path, tokenizer, suffix):
    path = write(tmp_path / "niah_single_1" / f"validation{suffix}", RULER, RULER | {"index": 1, "length": 4050})
    first, second = read(path, "ruler", tokenizer)
    assert first.messages == [{"role": "user", "content": RULER["input"]}] and first.references == ["8231"]
    assert (first.benchmark, first.task, first.length, first.answer_tokens) == ("ruler", "niah_single_1", 4050, 128)
    assert first.prefix == "The special magic number is" and first.scorer == "string_match_all"
    assert first.depth == pytest.approx(RULER["input"].index("8231") / len(RULER["input"]))
    assert first.name != second.name and len(read(path, "ruler", tokenizer, limit=1)) == 1


def test_ruler_of_earlier_versions_and_its_questions(tmp_path, tokenizer):
    old = {"index": 0, "input": "Answer: ", "outputs": ["yes", "no"], "others": {"id": 3}}
    (found,) = read(write(tmp_path / "qa_1.jsonl", old), "ruler", tokenizer)
    assert (found.task, found.scorer, found.answer_tokens) == ("qa_1", "string_match_part", 32)
    assert found.prefix == "" and found.length is None and found.depth is None


def test_longbench(tmp_path, tokenizer):
    (found,) = read(write(tmp_path / "data.json", LONGBENCH), "longbench-v2", tokenizer)
    text = found.messages[0]["content"]
    assert found.task == "short" and found.references == ["C"] and found.length is None
    assert text.index("three boats.") < text.index("How many boats?") < text.index("(A) One\n(B) Two\n(C) Three\n(D)")
    assert SCORERS[found.scorer]("The correct answer is (C)", found.references) == 1


def test_longmemeval(tmp_path, tokenizer):
    number = LONGMEMEVAL | {"question_id": "x", "answer": 3}
    never = LONGMEMEVAL | {"question_id": "e47becba_abs"}
    taste = LONGMEMEVAL | {"question_type": "single-session-preference"}
    path = write(tmp_path / "longmemeval_s.json", LONGMEMEVAL, number, never, taste)
    first, second, third, fourth = read(path, "longmemeval", tokenizer)
    text = first.messages[0]["content"]
    places = [text.index(part) for part in ("2023/05/20", "Hello,", "2023/05/22", "old fence", "2023/05/30", "paint?")]
    assert places == sorted(places) and "has_answer" not in text
    assert first.depth == pytest.approx(text.index("Conversation of 2023/05/22") / len(text), abs=0.03)
    assert first.task == "single-session-user" and second.references == ["3"] and not first.left_out
    assert (third.task, third.scorer) == ("abstention", "refusal") and not third.left_out
    assert "rubric" in fourth.left_out and second.name.endswith(":x")


def test_mrcr(tmp_path, tokenizer):
    (found,) = read(write(tmp_path / "2needle.parquet", MRCR), "mrcr", tokenizer)
    prompt = json.loads(MRCR["prompt"])
    long = MRCR | {"prompt": json.dumps([*prompt, {"role": "user", "content": "x" * 9000}])}  # one token a character
    assert [each.length for each in read(write(tmp_path / "two.parquet", MRCR, long), "mrcr", tokenizer)] == [
        8192,
        16384,
    ]
    assert found.messages == CHAT and found.prefix == "" and found.task == "2 needles" and found.depth == 3 / 5
    assert found.answer_tokens == len(MRCR["answer"]) + 16  # one token a character
    assert SCORERS[found.scorer](MRCR["answer"], found.references) == 1
    assert SCORERS[found.scorer]("More snouts.", found.references) == 0


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("ruler", LONGBENCH, r"row 1 \(as ruler\): no field 'input'; it has _id, answer, choice_A"),
        ("ruler", RULER | {"outputs": "8231"}, "field 'outputs' is not a list"),
        ("ruler", RULER | {"outputs": []}, "field 'outputs' is not a list of texts"),
        ("ruler", RULER | {"length": "long"}, "field 'length' is not a whole number"),
        ("longbench-v2", RULER, "no field 'answer'"),
        ("longbench-v2", LONGBENCH | {"answer": "E"}, "field 'answer' is 'E', not A, B, C or D"),
        ("longbench-v2", {k: v for k, v in LONGBENCH.items() if k != "choice_D"}, "no field 'choice_D'"),
        ("longmemeval", MRCR, "no field 'question_type'"),
        ("longmemeval", LONGMEMEVAL | {"haystack_dates": []}, "2 in 'haystack_sessions', but 0"),
        ("longmemeval", LONGMEMEVAL | {"haystack_sessions": ["hello", "x"]}, "not a list of lists of role and content"),
        ("longmemeval", LONGMEMEVAL | {"answer": None}, "field 'answer' is missing"),
        ("mrcr", RULER, "no field 'prompt'"),
        ("mrcr", MRCR | {"prompt": "write a poem"}, "field 'prompt' is not JSON"),
        ("mrcr", MRCR | {"prompt": '["hello"]'}, "not a list of messages"),
        ("mrcr", {k: v for k, v in MRCR.items() if k != "random_string_to_prepend"}, "random_string_to_prepend"),
    ],
)
def test_another_format_is_one_line_with_row_and_field(tmp_path, tokenizer, kind, row, message):
    with pytest.raises(InputError, match=message) as caught:
        read(write(tmp_path / "data.json", row), kind, tokenizer)
    assert "\n" not in str(caught.value) and "data.json" in str(caught.value)


def test_unreadable_files_are_one_line(tmp_path, tokenizer):
    def fails(name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read(path, "ruler", tokenizer)

    fails("gone.json", None, "no such file")
    fails("a.json", b"{", r"a\.json: cannot be read after row 0 \(Expecting")
    fails("deep.json", b"[" * 100_000, r"deep\.json: cannot be read after row 0 \(")
    fails("digits.jsonl", b'{"input": ' + b"9" * 5_000 + b"}\n", "line 1: not JSON")
    fails("deep.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON")
    fails("b.json", b'{"input": "x"}', "not a list of examples")
    fails("c.json", b"[]", "no rows")
    fails("d.json", b"[3]", "row 1 .*not an object")
    fails("e.jsonl", b'{"input": "x"\n', "line 1: not JSON")
    fails("f.jsonl", b"\xff\xfe\n", "line 1: not JSON in UTF-8")
    fails("g.parquet", b"PAR", r"g\.parquet: cannot be read after row 0 \(")
    with pytest.raises(InputError, match=r"neither a \.json, \.jsonl or \.parquet file nor a data set"):
        read("nobody/nothing-of-this-name", "ruler", tokenizer)


def test_a_mark_of_byte_order_is_no_text(tmp_path, tokenizer):
    for name, text in (("a.json", json.dumps([RULER])), ("a.jsonl", json.dumps(RULER))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(read(tmp_path / name, "ruler", tokenizer)) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_every_reader_of_the_list_reads_its_own_rows_and_no_others(tmp_path, tokenizer, kind):
    rows = {"ruler": RULER, "longbench-v2": LONGBENCH, "longmemeval": LONGMEMEVAL, "mrcr": MRCR}
    rows |= {other: rows[0] for other, (_, rows) in SUITES.items()}
    assert list(FORMATS) == list(rows)
    name = SUITES[kind][0] if kind in SUITES else "own.json"
    found, *_ = read(write(tmp_path / name, rows.pop(kind)), kind, tokenizer)
    assert found.benchmark == kind and found.scorer in SCORERS and found.name.startswith(kind) and not found.left_out
    for other in rows.values():
        with pytest.raises(InputError, match=rf"other.json row 1 \(as {kind}\): (no )?field"):
            read(write(tmp_path / "other.json", other), kind, tokenizer)


def test_the_configuration_and_the_command_know_every_format_of_the_list():
    option = get_type_hints(cli.benchmark, include_extras=True)["file"].__metadata__[0]
    assert option.help == f"FORMAT=FILE, FORMAT one of {', '.join(FORMATS)}."
    with pytest.raises(ValidationError, match=r"Input should be 'ruler', .* or 'helmet-rag'"):
        BenchmarkFile(format="squad", source="x.json")
