"""The speed of evaluation: what it compares with the release's figures is there, and is what the evaluation says."""

import pytest

from benchmarks.evaluate import LAYERS, WINDOW, measure_ours, write_documents
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.flashmemory.folder import import_dumps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    write_documents(folder, 1, 256, 8)
    trace = TraceConfig(
        chunking=Chunking(tokens=4, sink=0, recent=0), layers=LAYERS, oracle="indexer", window=WINDOW, tail=1
    )
    assert not import_dumps(folder, folder / "store", trace, lambda items, _: items).failed
    return folder


def test_every_layer_and_their_maximum_have_every_metric(folder):
    seconds, metrics = measure_ours(folder, heads=2, rank=8)
    assert seconds > 0 and set(metrics) == {"joined", *(f"layer {layer}" for layer in LAYERS)}
    for found in metrics.values():
        recalls = [found[f"recall@{top}"] for top in (8, 16, 32, 64, 128)]
        assert recalls == sorted(recalls) and 0 < recalls[-1] < 1  # more chunks, none lost
        precision, recall = found["precision"], found["recall"]
        assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
