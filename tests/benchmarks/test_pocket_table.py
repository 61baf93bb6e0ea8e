"""The pocket table counts what a benchmark's folder says was answered."""

import sys

import pytest

from benchmarks.pocket_table import main, rows_of, tables
from data_gen.core.chunks import Chunking
from eval.online.benchmark import JOURNAL
from eval.online.records import Journal, Record
from eval.online.summary import accuracy_rows, wilson
from eval.report.rows import Setting
from eval.report.tables import write_results

SETTING = Setting(
    model="m", recipe="pocket-v4", commit="abc", date="2026-01-02", chunking=Chunking(tokens=4), window=64,
    documents="d", loss=None,
)  # fmt: skip


def record(name, task, scores, left_out=""):
    runs = [
        {"policy": policy, "budget": None if policy == "full" else 0.125, "kept": 1.0 if policy == "full" else 0.2,
         "kv_bytes": 8, "chunks": 2.0, "refreshes": 0, "score": score, "response": "x"}
        for policy, score in scores.items()
    ]  # fmt: skip
    return Record(name=name, benchmark="ruler", task=task, length=1024, depth=None, tokens=1030, left_out=left_out,
                  runs=runs)  # fmt: skip


def benchmark(folder, *records):
    """What `lookahead benchmark` leaves of these records; returns their journal."""
    write_results(folder, measured={"benchmark": SETTING}, benchmark=accuracy_rows(records, None))
    journal = Journal(folder / JOURNAL, {})
    for each in records:
        journal.add(each)
    return journal


def test_a_part_of_an_answer_is_not_right(tmp_path):
    benchmark(
        tmp_path / "pocket",
        record("a", "multi_key-1024", {"full": 1, "indexer": 0}),
        record("b", "multi_value-1024", {"full": 1, "indexer": 2 / 3}),
        record("c", "multi_value-1024", {"full": 1, "indexer": 1}),
    )
    rows = {(row["task"], row["policy"]): row for row in rows_of(tmp_path / "pocket")}
    counted = {key: (row["right"], row["questions"]) for key, row in rows.items()}
    assert counted == {
        ("multi_key", "full"): (1, 1), ("multi_key", "indexer"): (0, 1), ("multi_value", "full"): (2, 2),
        ("multi_value", "indexer"): (1, 2), ("all", "full"): (3, 3), ("all", "indexer"): (1, 3),
    }  # fmt: skip
    low, high = wilson(1, 3)
    assert rows["all", "indexer"] == {
        "pocket": "pocket", "length": 1024, "task": "all", "policy": "indexer", "budget": 0.125, "right": 1,
        "questions": 3, "low": round(low, 3), "high": round(high, 3), "score": 0.5556, "kept": 0.2, "commit": "abc",
        "date": "2026-01-02",
    }  # fmt: skip
    (shown,) = tables({"rows": list(rows.values())})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if "1024" in line]
    assert cells == [
        ["1024", "full", "-", "1 of 1", "2 of 2", "3 of 3", "1.000 [0.438, 1.000]", "100.0%", "100.0%"],
        ["1024", "indexer", "0.125", "0 of 1", "1 of 2", "1 of 3", "0.333 [0.061, 0.792]", "55.6%",
         "20.0%"],
    ]  # fmt: skip


def test_the_mean_is_of_the_lengths(tmp_path):
    asked = enumerate([(2048, 1), (1024, 0), (1024, 0), (1024, 1)])
    benchmark(tmp_path, *(record(str(number), f"copy-{length}", {"full": score}) for number, (length, score) in asked))
    (shown,) = tables({"rows": rows_of(tmp_path)})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()[4:]]
    assert [line[0] for line in lines] == ["1024", "2048", "mean"]
    assert lines[-1][-2:] == [f"{(1 / 3 + 1) / 2:.1%}", "100.0%"]


def test_what_was_not_measured_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"no benchmark in its results\.json; run lookahead benchmark"):
        rows_of(tmp_path)
    benchmark(tmp_path, record("a", "copy-1024", {}, left_out="longer than the backbone's context"))
    with pytest.raises(SystemExit, match="a was not asked: longer than"):
        rows_of(tmp_path)


def test_a_journal_of_another_run_is_refused(tmp_path):
    journal = benchmark(tmp_path, record("a", "copy-1024", {"full": 1}))
    journal.add(record("b", "copy-1024", {"full": 1}))
    with pytest.raises(SystemExit, match=r"2 answers to copy-1024 under full, results\.json counts 1"):
        rows_of(tmp_path)


def test_a_run_without_a_score_is_refused(tmp_path):
    benchmark(tmp_path).add(record("a", "copy-1024", {"full": None}))
    with pytest.raises(SystemExit, match="a has no score under full"):
        rows_of(tmp_path)


@pytest.mark.parametrize("text", [None, "", "{}\n{"])
def test_a_damaged_journal_is_one_line(tmp_path, monkeypatch, text):
    path = benchmark(tmp_path, record("a", "copy-1024", {"full": 1})).path
    path.unlink()
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["pocket_table", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"answers\.jsonl: damaged journal \(.*\); run lookahead benchmark") as caught:
        main()
    assert "\n" not in str(caught.value)
