"""A killed run loses at most the example that it was at."""

import json
import resource

import pytest

from data_gen.core.errors import InputError
from eval.online.records import Journal, Record


def record(name, **run):
    runs = [{"policy": "full", "budget": None, "kept": 1.0, "kv_bytes": 8, "chunks": 2.0, "refreshes": 0} | run]
    return Record(name=name, benchmark="needles", task="single", length=9, depth=None, tokens=9, left_out="", runs=runs)


def test_what_was_added_is_there_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    journal = Journal(path, {"budget": (0.1,)})
    first, second = record("a", score=1, response="x"), record("b", kl=0.5)
    journal.add(first)
    journal.add(second)
    assert Journal(path, {"budget": [0.1]}).records == {"a": first, "b": second}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "kl" not in lines[1]["runs"][0], "what was not measured is not written"
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
    for content in ('{}\n{"name": "a"}\n', "answers\n", "[]\n", "3\n", "[" * 100_000 + "\n", "\udcff\n", "{}\n[]\n"):
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=r"answers\.jsonl: damaged journal \(.+\); remove it") as caught:
            Journal(path, {})
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_and_what_was_kept_stays(tmp_path):
    path = tmp_path / "answers.jsonl"
    journal = Journal(path, {})
    journal.add(record("a"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match=r"the same command continues once there is room.*answers\.jsonl"):
            journal.add(record("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(Journal(path, {}).records) == ["a"]
