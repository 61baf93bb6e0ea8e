"""Pictures and tables of the report, drawn from rows that were worked out by hand."""

import json
import re

import pytest

from eval.online.online_policies import ONLINE_POLICIES
from eval.online.summary import accuracy_rows, depth_rows
from eval.report import diagnosis
from eval.report.diagnosis import reliability_curve
from eval.report.figures import accuracy_by_bytes, answers_by_depth, depth_by_length, kl_against_bytes, recall_curves
from eval.report.page import write_report
from eval.report.rows import CellRecall, DecodeRow, FidelityRow, RecallRow, ReliabilityRow
from eval.report.tables import STYLES, write_results
from indexer_train.losses import LOSSES
from tests.eval.online.test_summary import RECORDS
from tests.eval.report.conftest import DECODE, TEXT


def test_a_panel_for_each_length_and_a_point_for_each_policy():
    figure = accuracy_by_bytes(accuracy_rows(RECORDS, 1000))
    assert [axis.get_title() for axis in figure.axes] == ["needles, 1,000 tokens", "needles, 2,000 tokens"]
    points = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert points == {"full": [[10.0, 1.0]], "indexer": [[2.0, 0.5]]}
    assert accuracy_by_bytes([]) is None


def test_every_policy_that_decodes_has_a_line_of_its_own():
    lines = [STYLES[policy.name] for policy in ONLINE_POLICIES]
    assert len(set(lines)) == len(lines)


def test_a_heat_map_for_each_policy():
    figure = answers_by_depth(depth_rows(RECORDS))
    full, indexer, _ = figure.axes
    assert (full.get_title(), indexer.get_title()) == ("full", "indexer")
    assert {text.get_text() for text in indexer.texts} == {"0.50\nn=2"}
    assert indexer.images[0].get_array().tolist() == [[0.5, None], [None, 0.5]]
    assert answers_by_depth([]) is None


def test_the_report_shows_it(tmp_path):
    write_results(tmp_path, benchmark=accuracy_rows(RECORDS, 1000), benchmark_depth=depth_rows(RECORDS))
    page, summary = write_report(tmp_path)
    assert '<figure id="benchmark">' in page.read_text() and '<figure id="depth">' in page.read_text()
    assert re.search(r"<td>50 \[9-91\]</td><td>-50 \[-100, \+0\]</td><td>20.0%</td><td>2.0</td>", page.read_text())
    assert re.search(r"\| 50 \[9-91\] +\| -50 \[-100, \+0\] +\| 20.0% +\| 2.0 +\|", summary.read_text())
    assert re.search(r"\| indexer 10% +\| 50 +\| 2.0 +\| 57% +\| 20.0% +\|", summary.read_text())
    assert json.loads((tmp_path / "results.json").read_text())["benchmark"][1]["policy"] == "indexer"


def recall(policy, budget, mass, task="needles", indexer=None, **more):
    ratios = {"mass_recall": mass, "golden_recall": None, "precision": None, "f1": None, "kept": 0.1,
              "resident_mass": 0.5}  # fmt: skip
    place = {"policy": policy, "indexer": indexer, "task": task, "context": 9, "budget": budget, "documents": 3}
    bounds = dict.fromkeys(ratios) | {"mass_recall": (mass - 0.1, mass + 0.1)}
    return place | ratios | {"micro": ratios, "interval": bounds, "windows": 9} | more


def test_kl_has_a_panel_for_decode_and_one_for_each_length():
    texts = [FidelityRow.model_validate(row) for row in TEXT["benchmark_text"]]
    figure = kl_against_bytes([DecodeRow.model_validate(row) for row in DECODE], texts)
    assert [axis.get_title() for axis in figure.axes] == ["decode", "text, 500 tokens"]
    assert [bars.get_label() for bars in figure.axes[1].containers] == ["indexer", "random"]
    assert [bars[0].get_xdata().tolist() for bars in figure.axes[1].containers] == [[1.5], [2.0]]
    assert all(bars[0].get_ydata() == pytest.approx(0.05) for bars in figure.axes[1].containers)
    assert kl_against_bytes([], []) is None


def test_recall_is_drawn_with_the_bands_of_indexers_only():
    rows = [recall("indexer", budget, 0.3, indexer="indexer") for budget in (0.05, 0.1)]
    rows += [recall("recency", 0.1, 0.2), recall("indexer", "threshold", 0.9, indexer="indexer")]
    figure = recall_curves([RecallRow.model_validate(row) for row in [*rows, recall("protected", 0.1, 0.0)]])
    points = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert points == {"indexer": [[5.0, 0.3], [10.0, 0.3]], "recency": [[10.0, 0.2]]}
    assert len(figure.axes[0].collections) == 1 and not figure.axes[1].lines
    assert recall_curves([]) is None


def test_the_heat_map_leaves_empty_cells_between_blank():
    cells = [recall("indexer", 0.1, 0.4, depth=depth, length=length)
             for depth, length in (((0.0, 0.2), (1, 2)), ((0.4, 0.6), (3, 4)))]  # fmt: skip
    bins = (["0%-20%", "20%-40%", "40%-60%", "60%-80%"], ["1-2", "2-3", "3-4"])
    figure = depth_by_length([CellRecall.model_validate(row) for row in cells], bins)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == bins[0][:3]
    assert [label.get_text() for label in axis.get_xticklabels()] == bins[1]
    assert axis.images[0].get_array().count() == 2 and len(axis.texts) == 2


def test_a_sigmoid_is_drawn_of_probabilities_only():
    bins = [ReliabilityRow(predicted=0.5, observed=share, chunks=4) for share in (0.1, 0.9)]
    for probabilities, lines in ((True, 2), (False, 1)):
        figure = reliability_curve(bins, probabilities)
        assert len(figure.axes[0].lines) == lines


@pytest.mark.parametrize("loss", [*LOSSES, None])
def test_a_loss_that_trains_an_order_has_no_sigmoid(loss, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(diagnosis, "reliability_curve", lambda bins, probabilities: drawn.append(probabilities))
    setting = {"model": "m", "recipe": None, "commit": None, "date": "2026-01-01", "chunking": {"tokens": 4},
               "window": 8, "documents": "d", "loss": loss}  # fmt: skip
    evaluated = {"budget": 0.1, "golden": 0.01, "every_token": False, "bins": ([], []), "notes": [],
                 "thresholds": {"indexer": "0"}}  # fmt: skip
    write_results(tmp_path, measured={"evaluate": setting}, documents=[], evaluated=evaluated)
    page, _ = write_report(tmp_path)
    assert drawn == [loss is None or LOSSES[loss].pointwise]
    assert ("trained an order" in page.read_text()) is not drawn[0]
