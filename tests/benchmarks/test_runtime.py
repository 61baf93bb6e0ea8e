"""Rows of the captured step at tiny sizes: which there are; on a CPU the step writes what the eager one does."""

import sys

import pytest
import torch

from benchmarks.runtime import compiled, main, measure_graph
from indexer_train.formats.bundle import export_bundle
from tests.conftest import tiny_model
from tests.eval.runtime.indexers import untrained


def test_rows_of_the_captured_step(tmp_path):
    model = tiny_model("gemma3")
    export_bundle(untrained(model), tmp_path / "bundle")
    ids = torch.randint(3, 100, (1, 150), generator=torch.Generator().manual_seed(0))
    rows = measure_graph(model, tmp_path / "bundle", ids, 20, 0.2, [1, 2], fuse=False)
    kinds = [(row["batch"], row["budget"], row["kind"]) for row in rows]
    assert kinds == [(b, share, kind) for b in (1, 2) for share in (1.0, 0.2) for kind in ("eager", "graph")]
    for row in rows:
        assert row["tokens_as_eager"] == 1 and row["windows_as_eager"] == "3 of 3"
        assert row["tokens_per_second"] > 0 and row["dtype"] == "float32"
        assert row["resident_share"] == pytest.approx(1) if row["budget"] == 1 else row["resident_share"] < 0.5
    assert all(row["times_full"] == 1 for row in rows if row["budget"] == 1)


def test_norms_and_mlps_of_a_copy_are_compiled():
    model = tiny_model("gemma3")
    fused = compiled(model)
    kinds = {type(module).__name__: module._compiled_call_impl is not None for module in fused.modules()}
    assert {name for name, is_compiled in kinds.items() if is_compiled} == {"Gemma3RMSNorm", "Gemma3MLP"}
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_compiled_rows_without_a_graph_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["runtime", "--bundle", "x", "--model", "tiny", "--prompt", "y", "--compile"])
    with pytest.raises(SystemExit):
        main()
    assert "give that as well" in capsys.readouterr().err
