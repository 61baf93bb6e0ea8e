"""Rows of the captured step at tiny sizes: which there are; on a CPU the step writes what the eager one does."""

import pytest
import torch

from benchmarks.runtime import measure_graph
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
