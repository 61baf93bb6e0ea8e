import json
import sys

import torch

from benchmarks import evaluate_gpu


def test_every_section_is_made_and_its_seconds_kept(tmp_path, monkeypatch):
    output = tmp_path / "evaluate.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["evaluate_gpu", "--documents", "1", "--tokens", "1024", "--rows", "128", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    evaluate_gpu.main()
    report = json.loads(output.read_text())
    assert report["documents"] == 1 and report["origin"]["commit"] and report["figures"] > 500
    assert report["cpu"]["seconds"] > 0 and "gpu" not in report
