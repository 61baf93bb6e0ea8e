import json

import pytest
import torch

from benchmarks.decode import Sizes, measure
from benchmarks.timing import Row, WrongResultError, check_output, require

TINY = Sizes((128,), (2,), (16, 24, 16), 256, 16, 16, 8, (2,), (1,), (8,), 1 << 16)


def test_every_stage_is_right_and_has_its_figures(tmp_path, capsys):
    output = tmp_path / "decode.json"
    assert measure(torch.device("cpu"), TINY, output) == []
    report = json.loads(output.read_text())
    stages = [row["stage"].split(",")[0].split(" score")[0] for row in report["rows"]]
    assert report["device"] and report["commit"] and report["command"] and report["wall_seconds"] > 0
    assert set(stages) >= {"Level-1 queries", "Level-1", "Level-2", "sparse MQA"}
    assert sum(stage.startswith("fetch") for stage in stages) == 4
    assert all(row["us"] > 0 and (row["bytes"] is None or row["limit_us"] > 0) for row in report["rows"])
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("| ")]) == len(stages) + 1


def test_a_stage_that_breaks_costs_its_own_rows_only(tmp_path, capsys):
    output = tmp_path / "decode.json"
    broken = Sizes((128,), (2,), (16, 24, 16), 256, 16, 0, 8, (), (1,), (), 1 << 16)  # fetches no list of chunks
    failed = measure(torch.device("cpu"), broken, output)
    assert len(failed) == 1 and failed[0].startswith("fetch: ValueError")
    rows = json.loads(output.read_text())["rows"]
    assert any(row["stage"].startswith("Level-2") for row in rows)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    for path, what in ((tmp_path, "a folder"), (tmp_path / "no" / "a.json", "its folder is missing")):
        with pytest.raises(SystemExit, match=f"--output .*: {what}; name a file"):
            check_output(path)
    check_output(tmp_path / "a.json")


def test_rates():
    row = Row("copy", "torch", us=2.0, bytes=6000, limit_us=1.0)
    assert row.line() == "| copy | torch | 2.0 us | 3.0 GB/s | 1.0 us | 50% |"
    assert Row("copy", "torch", us=0.5, bytes=6000, limit_us=1.0).line().endswith("| 1.0 us | - |")
    assert Row("plan", "numpy", us=2.0).line() == "| plan | numpy | 2.0 us | - | - | - |"
    with pytest.raises(WrongResultError, match="fetch"):
        require(False, "fetch")
