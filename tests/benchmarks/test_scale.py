"""The benchmark of scale at toy size: every part runs, and what it counts is what is there."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import scale
from data_gen.text.plan import Plan
from data_gen.traces.store import TraceStore


def test_a_made_source_is_planned_and_counted(tmp_path):
    found = scale.plan(tmp_path, 40, [200, 300], "tiny")
    assert found["documents"] == 40 and 40 * 200 <= found["tokens"] <= 40 * 300
    rows = (tmp_path / "source.jsonl").read_text().splitlines()
    paragraphs = [each for row in rows for each in json.loads(row)["text"].split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    plan = Plan(tmp_path / "plan.parquet")
    assert sum(len(list(plan.documents(side))) for side in ("train", "heldout")) == 40


def test_a_made_store_is_opened(tmp_path):
    scale.write_store(tmp_path / "train", 1005, rows=24, chunks=32)
    assert {path.parent.name for path in TraceStore.open(tmp_path / "train").paths()} == {"0000", "0001"}
    for loss in ("listwise_mass", "focal", None):
        assert scale.opened(tmp_path / "train", loss)["documents"] == 1005


@pytest.mark.parametrize("candidates", ["all", "sampled"])
def test_an_epoch_reads_every_file_once(tmp_path, candidates):
    scale.write_store(tmp_path / "train", 5, chunks=2048, hidden=512)
    read = scale.epoch(tmp_path / "train", candidates, None)
    if not read["read_mib"]:
        pytest.skip("temporary files lie in memory here")
    assert read["documents"] == 5 and read["needed_mib"] <= read["read_mib"] <= 1.2 * read["mib"]


def test_what_a_server_has_read_is_counted():
    """And nothing for this process, which asked."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as served:
        assert served.stdin and served.stdout
        before, own = scale._read_bytes(served.pid), scale._read_bytes(None)
        for _ in range(16):
            served.stdin.write(bytes(1 << 12))
            served.stdin.flush()
            served.stdout.read(1 << 12)
        assert scale._read_bytes(served.pid) - before >= 1 << 16 and scale._read_bytes(None) == own
        served.stdin.close()


def test_a_file_system_is_that_of_the_innermost_mount(tmp_path):
    kind = subprocess.run(["stat", "-f", "-c", "%T", "/proc"], capture_output=True, text=True, check=True).stdout
    assert scale._file_system(Path("/proc/self")) == kind.strip() == "proc"


def test_an_estimate_is_arithmetic():
    flash, _ = scale.estimate(10_000, 131072, 1.1, None)
    one = 8 * 32768 * 132 + 8 * 512 * 4096 * 2  # keys, hidden states
    assert flash["model"] == "DeepSeek-V4-Flash" and flash["terabytes"] == pytest.approx(10_000 * one / 1e12, rel=0.2)
    assert flash["hours_reading"] == pytest.approx(1.1 * flash["terabytes"] * 1e12 * 8 / 10e9 / 3600)


def test_an_estimate_by_traces_is_of_their_bytes_and_rate(finished, tmp_path):
    out = shutil.copytree(finished / "traces", tmp_path / "traces")
    files = sorted(out.rglob("doc_*"))
    lengths = [row["length"] for rows in Plan(out / "plan.parquet").brief.values() for row in rows]
    (row,) = scale.estimate(100, round(sum(lengths) / len(lengths)), 1, out)
    assert (row["traced"], row["traced_tokens"]) == (len(files), sum(lengths) / len(lengths))
    assert row["bytes"] == pytest.approx(sum(path.stat().st_size for path in files) / len(files), rel=0.05)
    for second, path in enumerate(files):
        os.utime(path, (second, second))
    (row,) = scale.estimate(100, 1000, 1, out)
    assert row["tokens_a_second"] == pytest.approx(sum(lengths) / len(lengths), rel=0.1)
    assert row["hours_tracing"] == pytest.approx(100 * 1000 / row["tokens_a_second"] / 3600)


def estimated(monkeypatch, capsys, out):
    """What `estimate --store` prints of `out`."""
    monkeypatch.setattr("sys.argv", ["scale", "estimate", "--store", str(out), "--tokens", "1000"])
    scale.main()
    ((_, (row,)),) = json.loads(capsys.readouterr().out).items()
    return row


def test_an_estimate_of_traces_is_printed_and_not_kept_where_nobody_asked(finished, monkeypatch, capsys):
    before = scale.OUTPUT.read_bytes()
    assert estimated(monkeypatch, capsys, finished / "traces")["tokens"] == 1000
    assert scale.OUTPUT.read_bytes() == before


def test_an_estimate_is_made_while_a_side_is_not_begun_and_refused_before_two_are_traced(
    finished, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(finished / "traces", tmp_path / "traces")
    shutil.rmtree(out / "heldout")
    traced = sorted((out / "train").rglob("doc_*"))
    assert estimated(monkeypatch, capsys, out)["traced"] == len(traced)
    for path in traced[1:]:
        path.unlink()
    with pytest.raises(SystemExit, match=f"^{out}: .* trace two or more documents"):
        estimated(monkeypatch, capsys, out)
    with pytest.raises(SystemExit, match=r"plan\.parquet: damaged plan"):
        estimated(monkeypatch, capsys, tmp_path)


def test_workers_trace_a_plan_that_the_built_in_text_fills(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "_called", lambda function, out: {"documents_a_second": 4.0})
    monkeypatch.setattr(scale, "_called_at_once", lambda function, calls: [{"seconds": 11.0}] * len(calls))
    for row in scale.workers(tmp_path):
        brief = Plan(tmp_path / str(row["workers"]) / "plan.parquet").brief
        planned = sum(map(len, brief.values()))
        assert planned == 121 and row["documents_a_second"] == planned / 11 and row["of_the_model_alone"] == 2.75


def test_a_process_that_fails_ends_the_benchmark(tmp_path):
    with pytest.raises(SystemExit, match="alone: a process failed"):
        scale._called(scale.alone, tmp_path)
