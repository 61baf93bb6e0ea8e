"""A killed run loses at most the example that it was at."""

import pytest

from data_gen.core.errors import InputError
from eval.online.journal import Journal


def test_what_was_added_is_there_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    journal = Journal(path, {"budget": (0.1,)})
    journal.add({"name": "a", "score": 1})
    journal.add({"name": "b", "score": 0.5})
    assert Journal(path, {"budget": [0.1]}).records == {
        "a": {"name": "a", "score": 1},
        "b": {"name": "b", "score": 0.5},
    }


def test_half_a_line_is_forgotten(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, {}).add({"name": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": "b", "sc')
    journal = Journal(path, {})
    assert list(journal.records) == ["a"] and path.read_bytes() == whole
    journal.add({"name": "b"})
    assert list(Journal(path, {}).records) == ["a", "b"]
    path.write_bytes(whole[:5])  # killed before the settings were whole
    assert Journal(path, {}).records == {}


def test_other_settings_and_damage_are_one_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, {"seed": 0, "budgets": [0.1]}).add({"name": "a"})
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        Journal(path, {"seed": 1, "budgets": [0.1]})
    with pytest.raises(InputError, match=r"other settings \(haystack\)"):
        Journal(path, {"seed": 0, "budgets": [0.1], "haystack": "x"})
    path.write_text("answers\n")
    with pytest.raises(InputError, match="damaged"):
        Journal(path, {})
