"""The bridge on trained weights: the pocket's own indexers, read natively, scored, exported and read back."""

import pytest
import torch

from data_gen.core.key_bytes import decode_keys
from indexer_train.formats.convert import export_indexer, import_checkpoints
from indexer_train.formats.native import initialise
from indexer_train.model import MemoryIndexer


def inputs(store):
    """(hidden [T, L, hidden], keys [N, L, 132], positions [T]) of the first document's native rows."""
    document = next(iter(store))
    layers = store.manifest.trace.layers
    rows = len(document.native(layers[0]))
    hidden = torch.stack([document.hidden(layer)[:rows].float() for layer in layers], dim=1)
    return hidden, torch.stack([document.keys(layer) for layer in layers], dim=1), document.positions[:rows]


def test_native_weights_give_the_models_own_logits(pocket_traces, pocket_indexer):
    """Within what fp8 keys allow: sum_h |w_h| sum_i |q_hi k_i| / 16, half a step of three mantissa bits."""
    hidden, keys, positions = inputs(pocket_traces)
    queries = pocket_indexer.query_encoder({"input_features": hidden, "positions": positions})["sentence_embedding"]
    read = pocket_indexer[0].sub_modules["document"][0]({"input_values": keys})["sentence_embedding"]
    logits = pocket_indexer.layer_logits(queries, read).detach()
    compared = 0
    for place, layer in enumerate(pocket_indexer.spec.layers):
        magnitude = decode_keys(keys[:, place]).abs().float()
        for row, native in next(iter(pocket_traces)).native(layer).items():
            ours, theirs = logits[place, row, : len(native.logits)], native.logits
            allowed = (native.weights.abs() @ (native.query.abs() @ magnitude.T) / 16)[: len(theirs)]
            assert torch.all((ours - theirs).abs() <= allowed)
            assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.999
            compared += len(theirs)
    assert compared > 3 * 3 * 200


@pytest.mark.parametrize("format", ["flashmemory-joint", "flashmemory-layers", "flashmemory-safetensors"])
def test_exported_and_read_back_bit_for_bit(pocket, pocket_traces, pocket_indexer, tmp_path, format):
    spec = pocket_indexer.spec
    rope = spec.rope.model_copy(update={"positions": 2048})  # two of the formats hold a row for each
    short = spec.model_copy(update={"rope": rope})
    indexer = MemoryIndexer.from_spec(short, device="cpu").eval()
    initialise(indexer, pocket.folder)
    out = tmp_path / ("out.safetensors" if format == "flashmemory-safetensors" else "out")
    back = import_checkpoints(export_indexer(indexer, out, format).files, manifest=pocket_traces.manifest)
    ours, theirs = indexer.query_encoder.state_dict(), back.query_encoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items())
    assert torch.equal(back.joined_scores(*inputs(pocket_traces)), pocket_indexer.joined_scores(*inputs(pocket_traces)))
