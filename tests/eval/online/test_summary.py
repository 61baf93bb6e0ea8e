"""Rows and tables worked out by hand."""

import math

import pytest

from eval.online.records import Record
from eval.online.summary import accuracy_rows, depth_rows, fidelity_rows, left_out_lines, wilson
from eval.report.tasks import average_rows, benchmark_table, difference_table, fidelity_table


def record(name, task, length, scores, depth=None, left_out=""):
    runs = [
        {"policy": policy, "budget": None if policy == "full" else 0.1, "score": score, "response": "",
         "kept": 1.0 if policy == "full" else 0.2, "kv_bytes": 10e6 if policy == "full" else 2e6, "chunks": 5.0,
         "refreshes": 0}
        for policy, score in scores.items()
    ]  # fmt: skip
    return Record(name=name, benchmark="needles", task=task, length=length, tokens=length, depth=depth,
                  left_out=left_out, runs=[] if left_out else runs)  # fmt: skip


RECORDS = [
    record("a", "single", 1000, {"full": 1.0, "indexer": 1.0}, 0.1),
    record("b", "single", 1000, {"full": 1.0, "indexer": 0.0}, 0.19),
    record("c", "single", 1000, {}, left_out="longer than the backbone's context"),
    record("d", "multi_value", 2000, {"full": 0.5, "indexer": 0.5}, 1.0),
    record("e", "multi_value", 2000, {"full": 1.0, "indexer": 0.5}, 0.99),
]


def test_accuracy_rows():
    full, indexer, many_full, many = accuracy_rows(RECORDS, trained=1000)
    assert (full.accuracy, indexer.accuracy, many_full.accuracy, many.accuracy) == (1, 0.5, 0.75, 0.5)
    assert (full.low, full.high) == wilson(2, 2) and (indexer.low, indexer.high) == wilson(1, 2)
    assert (many_full.low, many_full.high) == (0.5, 1.0)  # bootstrap of halves and ones
    assert indexer.difference == -0.5 and (indexer.difference_low, indexer.difference_high) == (-1, 0)
    assert (indexer.examples, indexer.left_out, many.left_out) == (2, 1, 0)
    assert (indexer.kv_mb, indexer.kept, full.kv_mb) == (2, 0.2, 10)
    assert (indexer.beyond, many.beyond) == (1, 2) and accuracy_rows(RECORDS, None)[0].beyond is None


def test_windows_under_full_attention_are_summed_and_shown():
    counts = [{"fallbacks": 1, "windows": 3}, {"fallbacks": 0, "windows": 2}]
    records = []
    for name, counted in zip("ab", counts, strict=True):
        plain = record(name, "single", 1000, {"full": 1.0, "indexer+fallback": 1.0})
        runs = [plain.runs[0], plain.runs[1].model_copy(update=counted)]
        records.append(plain.model_copy(update={"runs": runs}))
    full, fallback = accuracy_rows(records, None)
    assert (fallback.fallbacks, fallback.windows) == (1, 5) and full.windows is None
    assert "100 [34-100] / 2.0, 1 of 5 full |" in str(benchmark_table([full, fallback]))


def test_one_example_has_no_bootstrap_interval():
    (row,) = accuracy_rows([RECORDS[3].model_copy(update={"runs": RECORDS[3].runs[:1]})], None)
    assert row.low is None and "50 / 10.0" in str(benchmark_table([row]))


def test_left_out_is_said():
    lines = left_out_lines(RECORDS)
    assert lines == ["left out: 1 of needles single: longer than the backbone's context"]
    assert accuracy_rows([RECORDS[2]], 1000) == []


def test_depth_rows():
    rows = {(row.policy, *row.depth, row.length): row for row in depth_rows(RECORDS)}
    assert rows["indexer", 0.0, 0.2, 1000].accuracy == 0.5 and rows["indexer", 0.0, 0.2, 1000].examples == 2
    assert rows["full", 0.8, 1.0, 2000].accuracy == 0.75 and len(rows) == 4


def test_table_has_the_paper_s_shape_and_averages():
    lines = str(benchmark_table(accuracy_rows(RECORDS, 1000))).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == ["tokens", "n", "full", "indexer 10%"]
    assert cells[2] == ["needles single", "1000", "2", "100 [34-100] / 10.0", "50 [9-91] / 2.0"]
    assert cells[3][:2] == ["needles multi_value", "2000 (2.0x trained)"]
    assert cells[4] == ["average", "", "", "88 / 10.0", "50 / 2.0"]  # four examples bear no decimal
    assert cells[5] == ["share of full", "", "", "100% / 100.0%", "57% / 20.0%"]


def test_budgets_alike_in_whole_percent_are_columns_of_their_own():
    full, first = accuracy_rows(RECORDS, None)[:2]
    second = first.model_copy(update={"budget": 0.104, "accuracy": 1.0})
    rows = [full, first, second]
    for table in (benchmark_table(rows), difference_table(rows)):
        assert list(table.header[-2:]) == ["indexer 10%", "indexer 10.4%"]
    assert [(mean.budget, mean.accuracy) for mean in average_rows(rows)] == [(None, 1.0), (0.1, 0.5), (0.104, 1.0)]


def test_fidelity():
    def text(name, policy, agreement, kl, loss):
        run = {"policy": policy, "budget": 0.1, "kept": 0.3, "kv_bytes": 1e6, "chunks": 4.0, "refreshes": 2}
        run |= {"agreement": agreement, "kl": kl, "loss": loss}
        return Record(name=name, benchmark="text", task="text", length=500, tokens=500, depth=None, left_out="",
                      runs=[run])  # fmt: skip

    records = [text("a", "indexer", 0.9, 0.1, math.log(4)), text("b", "indexer", 0.7, 0.3, math.log(16))]
    (row,) = fidelity_rows(records, 250)
    assert row.agreement == pytest.approx(0.8) and row.perplexity == pytest.approx(8) and row.texts == 2
    assert row.agreement_interval == pytest.approx((0.7, 0.9)) and row.kl_interval == pytest.approx((0.1, 0.3))
    for texts, agreement, kl in (
        (2, "0.80 [0.70, 0.90]", "0.20 [0.10, 0.30]"),
        (20, "0.800 [0.700, 0.900]", "0.200 [0.100, 0.300]"),
    ):
        table = str(fidelity_table([row.model_copy(update={"texts": texts})]))
        assert f"| {agreement} " in table and f"| {kl} " in table and "500 (2.0x trained)" in table
    assert accuracy_rows(records, 250) == []
