"""What a run says of its stages."""

from itertools import count

import pytest

from recipes import stages
from recipes.schema import Took
from recipes.stages import STAGES, Stages, in_words

SECONDS = {"generate": 100, "train": 50, "evaluate": 10, "export": 1, "decode": 4000}


def test_times_are_those_of_the_recipe_and_then_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(stages, "monotonic", count(step=30).__next__)  # 10 s for each of three documents
    said = []
    run = Stages(Took(where="a machine, a commit", seconds=SECONDS), documents=20, say=said.append)
    assert [line.split()[0] for line in said[:-1]] == list(STAGES)
    assert "1 min 40 s" in said[0] and "1 h 6 min" in said[4] and said[5].startswith("times: a machine, a commit")
    documents = run.do("generate", lambda: [*run.paced("abcd"), *run.paced("efgh")])  # both sides, one pace
    assert documents == list("abcdefgh")
    pace = "generate 3 min 20 s, train 1 min 40 s, evaluate 20 s, export 2 s, decode 2 h 13 min"
    assert said[6:] == ["[1/5] generate", f"at the pace of the first 3 documents: {pace}"]
    run.end()
    assert said[-1] == "seconds: generate 120.0"


def test_no_time_is_made_up():
    said = []
    run = Stages(None, documents=20, say=said.append)
    assert list(run.paced("abcd")) == list("abcd") and len(said) == 6
    assert said[-1].startswith("times: not measured") and not any(word.isdigit() for word in said[:5])


def test_a_recipe_says_the_time_of_every_stage():
    with pytest.raises(ValueError, match="lacks decode"):
        Took(where="a machine", seconds={name: 1 for name in STAGES if name != "decode"})


def test_durations_in_words():
    assert [in_words(seconds) for seconds in (0.4, 59.4, 59.6, 3599.6)] == ["0 s", "59 s", "1 min 0 s", "1 h 0 min"]
