"""The benchmark in the report: both pictures and both tables, drawn from rows that were worked out by hand."""

import json

from matplotlib import pyplot

from eval.online.summary import accuracy_rows, depth_rows
from eval.report.figures_tasks import accuracy_by_bytes, answers_by_depth
from eval.report.page import write_report
from eval.report.tables import write_results
from tests.eval.online.test_summary import RECORDS


def test_a_panel_for_each_length_and_a_point_for_each_policy():
    figure = accuracy_by_bytes(accuracy_rows(RECORDS, 1000))
    assert [axis.get_title() for axis in figure.axes] == ["needles, 1,000 tokens", "needles, 2,000 tokens"]
    points = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert points == {"full": [[10.0, 1.0]], "indexer": [[2.0, 0.5]]}
    assert accuracy_by_bytes([]) is None
    pyplot.close(figure)


def test_a_heat_map_for_each_policy():
    figure = answers_by_depth(depth_rows(RECORDS))
    full, indexer, _ = figure.axes
    assert (full.get_title(), indexer.get_title()) == ("full", "indexer")
    assert {text.get_text() for text in indexer.texts} == {"0.50\nn=2"}
    assert indexer.images[0].get_array().tolist() == [[0.5, None], [None, 0.5]]
    assert answers_by_depth([]) is None
    pyplot.close(figure)


def test_the_report_shows_it(tmp_path):
    write_results(tmp_path, benchmark=accuracy_rows(RECORDS, 1000), benchmark_depth=depth_rows(RECORDS))
    page, summary = write_report(tmp_path)
    assert '<figure id="benchmark">' in page.read_text() and '<figure id="depth">' in page.read_text()
    assert "50 [9-91] / 2.0" in page.read_text() and "| 50 [9-91] / 2.0" in summary.read_text()
    assert json.loads((tmp_path / "results.json").read_text())["benchmark"][1]["policy"] == "indexer"
