"""Shared beginnings are read once, and nothing else changes."""

import pytest
import torch

from data_gen.core.chunks import Chunking
from data_gen.text.documents import user
from eval.online.examples import Example, common, in_order
from eval.online.runner import Prefill
from eval.online.session import DenseSession
from tests.conftest import tiny_model


def example(name, text):
    return Example(name, "ruler", "niah", None, [user(text)], ["x"], "string_match_all", 4)


def test_common_beginning():
    assert common([1, 2, 3], [1, 2, 4]) == 2 and common([1, 2], [1, 2, 3]) == 2 and common([], [1]) == 0


def test_those_that_begin_alike_are_neighbours():
    body, other = "a" * 1100, "b" * 1100
    given = [example("1", body + "x"), example("2", other), example("3", body + "y"), example("4", "short"),
             example("5", "short too")]  # fmt: skip
    pairs = [(first.name, after and after.name) for first, after in in_order(given)]
    assert sorted(name for name, _ in pairs) == list("12345")
    assert dict(pairs)["1"] == "3" and [after for _, after in pairs].count(None) == 4


def test_the_same_session_in_fewer_tokens(monkeypatch):
    model, chunking = tiny_model("llama"), Chunking(tokens=4)
    read = []
    plain = DenseSession.read
    monkeypatch.setattr(DenseSession, "read", lambda self, tokens: read.append(len(tokens)) or plain(self, tokens))
    body = torch.arange(60).tolist()
    prompts = [[*body, 1, 2, 3], [*body, 4, 5], [*body[:50], 6, 7, 8], [9, 8, 7]]
    prefill = Prefill(lambda: DenseSession(model, chunking))
    for prompt, after in zip(prompts, [*prompts[1:], None], strict=True):
        session = prefill.read(prompt, after)
        fresh = DenseSession(model, chunking)
        plain(fresh, prompt)
        assert session.position == fresh.position == len(prompt) - 1
        mine, whole = plain(session, [11]), plain(fresh, [11])
        torch.testing.assert_close(mine, whole, atol=1e-5, rtol=1e-5)
    assert read == [60, 3, 2, 53, 3]


@pytest.mark.parametrize("again", [1, 2])
def test_the_same_prompt_twice(again):
    model, chunking = tiny_model("llama"), Chunking(tokens=4)
    prefill = Prefill(lambda: DenseSession(model, chunking))
    prompt = torch.arange(40).tolist()
    positions = [prefill.read(prompt, prompt).position for _ in range(again + 1)]
    assert positions == [39] * (again + 1)
