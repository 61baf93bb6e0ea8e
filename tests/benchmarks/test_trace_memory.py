"""The benchmark of tracing's memory at toy size."""

import re
import subprocess
import sys

import pytest

from benchmarks.machine import machine
from benchmarks.trace_memory import main, measure


@pytest.mark.parametrize("oracle", ["indexer", "attention"])
def test_every_length_has_its_figures(oracle, capsys):
    measure(320, oracle)
    figures = rf"320 tokens, oracle {oracle}: \d+ s, peak memory \+\d+ MB \(the trace itself \d+ MB\); S x T scores .*"
    assert re.fullmatch(figures, capsys.readouterr().out.strip())


def test_the_machine_is_named_once_and_every_length_gets_a_process(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(sys, "argv", ["trace_memory", "--tokens", "320", "640"])
    monkeypatch.setattr("benchmarks.trace_memory.machine", lambda: "commit 0, a machine")
    monkeypatch.setattr(subprocess, "run", lambda call, **_: calls.append(call))
    main()
    assert capsys.readouterr().out == "commit 0, a machine\n"
    assert [call[-3:] for call in calls] == [[n, "--oracle", "indexer"] for n in ("320", "640")]


def test_the_machine_is_one_line():
    assert re.fullmatch(r"commit (\w{7,}(-dirty)?|unknown), .+, \d+ cores, \d+ threads, PyTorch \S+", machine())
