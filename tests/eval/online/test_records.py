"""A killed run loses at most the example that it was at."""

import json

import pytest

from data_gen.core.errors import InputError
from eval.online.records import Journal, Record, read_journal


def record(name, **run):
    runs = [{"policy": "full", "budget": None, "kept": 1.0, "kv_bytes": 8, "chunks": 2.0, "refreshes": 0} | run]
    return Record(name=name, benchmark="needles", task="single", length=9, depth=None, tokens=9, left_out="", runs=runs)


def test_what_was_added_is_there_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    journal = Journal(path, {"budget": (0.1,)})
    first, second = record("a", score=1, response="x"), record("b", kl=0.5).model_copy(update={"origin": {"cores": 2}})
    journal.add(first)
    journal.add(second)
    assert Journal(path, {"budget": [0.1]}).records == {"a": first, "b": second}
    assert read_journal(path) == ({"budget": [0.1]}, [first, second])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "origin" not in lines[1] and "kl" not in lines[1]["runs"][0], "what was not measured is not written"
    assert lines[1]["length"] == 9 and lines[1]["depth"] is None and lines[2]["runs"][0]["budget"] is None


def test_half_a_line_is_forgotten(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, {}).add(record("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": "b", "sc')
    journal = Journal(path, {})
    assert list(journal.records) == ["a"] and path.read_bytes() == whole
    journal.add(record("b"))
    assert list(Journal(path, {}).records) == ["a", "b"]
    path.write_bytes(whole[:5])  # killed before the settings were whole
    assert Journal(path, {}).records == {}


def test_other_settings_and_damage_are_one_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, {"seed": 0, "budgets": [0.1]}).add(record("a"))
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        Journal(path, {"seed": 1, "budgets": [0.1]})
    with pytest.raises(InputError, match=r"other settings \(haystack\)"):
        Journal(path, {"seed": 0, "budgets": [0.1], "haystack": "x"})
    path.write_text('{}\n{"name": "a"}\n')
    with pytest.raises(InputError, match=r"answers\.jsonl: damaged \(no record of an example\)"):
        Journal(path, {})
    path.write_text("answers\n")
    with pytest.raises(InputError, match="damaged"):
        Journal(path, {})
