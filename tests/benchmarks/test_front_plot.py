"""The README's plot shows the figures of the file that it is given."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.ablation_tables import EVERY
from benchmarks.front_plot import PICTURE, Point, main, plot, points_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_ablations_are_added_up_over_the_tasks_of_the_report():
    rows = [
        {"set": "report", "policy": "recipe", "task": "single", "documents": 4, "right": 0.75, "kept": 0.2},
        {"set": "report", "policy": "recipe", "task": "multi_key", "documents": 12, "right": 0.25, "kept": 0.4},
        {"set": "report", "policy": "recipe", "task": EVERY, "documents": 16, "right": 0.375, "kept": 0.35},
        {"set": "report", "policy": "recipe", "task": "text", "documents": 5, "kl": 0.07, "kept": 0.1},
        {"set": "development", "policy": "recipe", "task": "single", "documents": 4, "right": 0.0, "kept": 0.2},
    ]
    (point,) = points_of({"rows": rows})
    assert point == Point("indexer", 6, 16, pytest.approx(0.35), 0.07, 5, 0.1)


def test_rows_of_decode_are_taken_as_they_are():
    row = {"correct": 3, "examples": 9, "kv_share": 0.5, "texts": 2}
    rows = [row | {"policy": "mean_pooled", "kl": 0.2}, row | {"policy": "full", "kl": None, "kv_share": 1.0}]
    full, pooled = points_of({"decode": rows})
    assert full == Point("full attention", 3, 9, 1.0, 0.0, 2, 1.0)
    assert pooled == Point("mean-pooled keys", 3, 9, 0.5, 0.2, 2, 0.5)


def test_the_committed_picture_shows_the_committed_figures(tmp_path, monkeypatch):
    """Its words and the places of its marks: how glyphs and lines are written is a matter of matplotlib's version."""
    made = tmp_path / "answers.svg"
    monkeypatch.setattr(sys, "argv", ["front_plot", str(RESULTS / "ablations-smollm2-h200.json"), "--out", str(made)])
    main()
    words, marks = (
        [re.findall(found, path.read_text(encoding="utf-8")) for path in (made, PICTURE)]
        for found in (r"<!-- (.*) -->", r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"')
    )
    assert words[0] == words[1] and "indexer" in words[0], "run `python -m benchmarks.front_plot` on that file"
    places = [[float(each) for mark in found for each in mark] for found in marks]
    assert places[1] == pytest.approx(places[0], abs=1) and len(places[0]) > 20
    for path in (made, PICTURE):
        picture = path.read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in picture and not re.search("#000000|#ffffff", picture)


def test_every_policy_is_drawn_where_it_was_measured():
    points = points_of(json.loads((RESULTS / "ablations-smollm2-h200.json").read_text()))
    assert [point.policy for point in points] == [
        "full attention", "indexer", "oracle", "recency", "mean-pooled keys"
    ]  # fmt: skip
    figure = plot(points)
    answers, texts = figure.axes
    for axis, drawn in (
        (answers, [(100 * point.kept, 100 * point.right / point.questions) for point in points]),
        (texts, [(100 * point.kept_of_text, point.kl) for point in points]),
    ):
        found = [tuple(float(each[0]) for each in box.lines[0].get_data()) for box in axis.containers]
        assert found == [pytest.approx(pair) for pair in drawn]
