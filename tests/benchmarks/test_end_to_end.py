"""Cells of answers: means, leads and intervals against counting by hand; a stopped run goes on with the same."""

import json

import pytest

from benchmarks import end_to_end
from benchmarks.end_to_end import answer, answered, tables
from data_gen.core.errors import InputError
from eval.online.config import BenchmarkConfig
from eval.online.records import Record, RunRecord
from eval.online.summary import lead_rows, wilson
from tests.eval.conftest import indexer  # noqa: F401 - a fixture
from tests.eval.online.test_benchmark import tiny_backbone, trained  # noqa: F401 - a fixture


def run(policy, budget, **values):
    return RunRecord(policy=policy, budget=budget, kept=0.5, chunks=4.0, kv_bytes=2e6, refreshes=1, **values)


def of(*runs):
    return Record(name="x", benchmark="x", task="x", length=512, depth=None, tokens=512, left_out="", runs=list(runs))


def record(full, ours, recency, protected):
    return of(run("full", None, score=full), run("indexer", 0.1, score=ours), run("recency", 0.1, score=recency),
              run("protected", None, score=protected))  # fmt: skip


def test_a_lead_is_over_the_same_examples_and_only_where_the_indexer_ran():
    answers = [record(1, 1, 0, 0), record(1, 0, 0, 0), record(0, 1, 1, 0), record(1, 1, 0, 0)]
    found = {row.policy: row for row in lead_rows([*answers, of()], "single", 512)}
    assert {(row.examples, row.left_out, row.solved) for row in found.values()} == {(4, 1, 3)}
    recency = found["recency"]
    assert recency.score[0] == 0.25 and recency.score_lead[0] == 0.5
    assert recency.score_of_solved[0] == 0 and recency.lead_of_solved[0] == pytest.approx(2 / 3)
    assert recency.score_lead[1] < 0.5 < recency.score_lead[2]
    assert found["indexer"].score == (0.75, *wilson(3, 4))
    for policy in ("full", "protected", "indexer"):
        assert found[policy].score_lead == found[policy].lead_of_solved == (None,) * 3
    protected = next(line for line in tables([*found.values()]).splitlines() if "protected" in line)
    assert [cell.strip() for cell in protected.split("|")][9:11] == ["-", "-"]


def test_text_has_leads_in_nats():
    texts = [of(run("full", None, kl=0.0, agreement=1.0), run("indexer", 0.1, kl=kl, agreement=0.5),
                run("recency", 0.1, kl=2 * kl, agreement=0.25)) for kl in (0.1, 0.3)]  # fmt: skip
    found = {row.policy: row for row in lead_rows(texts, "text", 512)}
    assert found["recency"].kl_lead[0] == pytest.approx(-0.2) and found["indexer"].kl[0] == pytest.approx(0.2)
    assert found["recency"].agreement_lead[0] == 0.25 and found["full"].solved == 2


def test_nothing_answered_has_no_mean():
    assert lead_rows([of()], "single", 512) == []
    (row,) = lead_rows([of(run("full", None, score=0.5))], "single", 512)
    assert row.score == (0.5, None, None) and row.score_of_solved == (None, None, None)


@pytest.fixture
def asked(tokenizer, trained, tiny_recipe, monkeypatch):  # noqa: F811 - the fixture of that name
    monkeypatch.setattr(end_to_end, "load_bundle", lambda path: trained)
    monkeypatch.setattr(end_to_end, "load_backbone", lambda config: (tiny_backbone().model, tokenizer))

    def ask(out, lengths=(500,), **changes):
        settings = {"tasks": ["single", "text"], "examples": 2, "texts": 1, "text_tokens": 20, "policies": ["recency"]}
        config = BenchmarkConfig(**settings | changes)
        answer(tiny_recipe, out, list(lengths), config, out)
        return answered(out)

    return ask


def test_cells_asked_one_by_one_hold_the_same_examples(asked, tmp_path):
    together = asked(tmp_path / "together", (500, 600))
    assert list(together) == [("single", 500), ("text", 500), ("single", 600), ("text", 600)]
    for length in (500, 600):
        for task in ("single", "text"):
            apart = asked(tmp_path / "apart", (length,), tasks=[task])
    assert apart == together
    kept = (tmp_path / "apart" / "single-500" / "answers.jsonl").read_bytes()
    asked(tmp_path / "apart")
    assert (tmp_path / "apart" / "single-500" / "answers.jsonl").read_bytes() == kept


def test_answers_of_other_settings_are_not_mixed_in(asked, tmp_path):
    asked(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(budgets\)"):
        asked(tmp_path, budgets=[0.3])
    with pytest.raises(InputError, match="--length 40000: the backbone's context is 1200 tokens"):
        asked(tmp_path, (40_000,))
    with pytest.raises(InputError, match=r"single-500.* and .*single-600.* different settings"):
        asked(tmp_path, (600,), seed=1)
    with pytest.raises(InputError, match="no answers there"):
        answered(tmp_path / "nothing")
    header, first, *_ = (tmp_path / "single-500" / "answers.jsonl").read_text().splitlines()
    assert "seed" in json.loads(header) and json.loads(first)["origin"]["torch"]
