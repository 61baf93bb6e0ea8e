"""results.json and the models of its rows: written, read back, and refused where they do not fit."""

import json

import pytest
from pydantic import ValidationError

from data_gen.core.errors import InputError
from eval.offline.evaluation import evaluate
from eval.report.rows import AnswerRow, DecodeRow, Results
from eval.report.tables import read_results, write_results
from tests.eval.report.conftest import BENCHMARK, DECODE, TEXT


@pytest.fixture(scope="module")
def measured(stores, indexer, other):
    return evaluate({"A": indexer, "B": other}, stores[1], 0.05, 0.1)


def plain(value):
    return json.loads(json.dumps(value))


def test_every_figure_of_an_evaluation_is_read_back_bit_for_bit(measured, tmp_path):
    write_results(tmp_path, **measured)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == plain(Results(**measured).content()) and written.keys() == measured.keys()
    assert plain(read_results(tmp_path).content()) == written


def test_task_and_cell_are_fields(measured, tmp_path):
    results = write_results(tmp_path, **measured)
    for row in results.recall:
        assert row.budget == (f"top {row.top}" if row.top else row.budget)
        alone = "" if row.layer is None else f" layer {row.layer}"
        assert row.indexer is None or row.policy == f"{row.indexer}{alone}"
    assert {row.layer for row in results.recall} == {None, 0, 2} and {row.top for row in results.recall} > {None, 8}
    assert {row.indexer for row in results.recall} == {"A", "B", None}
    for row in results.heat:
        low, high = row.depth
        assert row.task == f"{low:.0%}-{high:.0%} | {row.length[0]:,}-{row.length[1]:,}"
    assert [row.task for row in results.by_length] == [f"{r.length[0]:,}-{r.length[1]:,}" for r in results.by_length]
    assert [row.task for row in results.by_depth] == [f"{r.depth[0]:.0%}-{r.depth[1]:.0%}" for r in results.by_depth]


def test_what_decode_and_benchmark_measure_is_read_back(tmp_path):
    answers = [{"document": "d", "task": "single", "values": ["7"], "full": "7", "indexer": "8"}]
    sections = {"decode": DECODE, "answers": answers, **BENCHMARK, **TEXT}
    write_results(tmp_path, **sections)
    assert json.loads((tmp_path / "results.json").read_text()) == plain(sections)
    results = read_results(tmp_path)
    assert results.decode[0].policy == "full" and results.answers[0].said == {"full": "7", "indexer": "8"}
    assert plain(results.content()) == plain(sections)
    assert AnswerRow(document="d", task="single", values=["7"], said={"full": "7"}).model_dump() == {
        "document": "d", "task": "single", "values": ["7"], "full": "7"
    }  # fmt: skip


def test_windows_under_full_attention_stay_where_they_are_counted(tmp_path):
    counted = BENCHMARK["benchmark"][1] | {"fallbacks": 1, "windows": 3}
    written = write_results(tmp_path, benchmark=[BENCHMARK["benchmark"][0], counted]).content()["benchmark"]
    assert "windows" not in written[0] and (written[1]["fallbacks"], written[1]["windows"]) == (1, 3)


def test_sections_are_added_and_replaced_and_none_is_invented(tmp_path):
    assert read_results(tmp_path).content() == {}
    (tmp_path / "results.json").write_text('{"comparison": null}')
    write_results(tmp_path, decode=DECODE, timeline=None)
    results = write_results(tmp_path, decode=DECODE[:1])
    assert list(results.content()) == ["decode"] and len(results.decode) == 1
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["decode"]


def test_rows_are_read_only_and_unknown_or_missing_fields_are_errors(tmp_path):
    row = DecodeRow(**DECODE[0])
    with pytest.raises(ValidationError, match="frozen"):
        row.kl = 0.0
    with pytest.raises(ValidationError, match="extra"):
        Results(decode=[DECODE[0] | {"colour": "red"}])
    with pytest.raises(ValidationError, match="kv_mb"):
        Results(decode=[{name: value for name, value in DECODE[0].items() if name != "kv_mb"}])
    for text in ("{", "[]", '{"decode": [{}]}', '{"colour": []}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match=r"results\.json: damaged results"):
            read_results(tmp_path)
        with pytest.raises(InputError, match="damaged results"):
            write_results(tmp_path, decode=DECODE)
        assert (tmp_path / "results.json").read_text() == text
