"""First weights from the lightning indexers of DSA models: scores before training are the stock indexers' own."""

import pytest
import torch

from benchmarks.models import ids
from benchmarks.tiny_models import tiny
from data_gen.backbones.load import adapter
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from indexer_train.config import IndexerConfig
from indexer_train.formats.native import initialise, read_native
from indexer_train.model import MemoryIndexer
from indexer_train.spec import IndexerSpec
from tests.data_gen.backbones.stock_indexers import stock_parts

LENGTH, LAYERS = 60, [1, 3]


@pytest.fixture(params=["deepseek_v32", "glm_moe_dsa"])
def backbone(request):
    return adapter(tiny(request.param))


def test_scores_are_those_of_the_stock_indexers_without_rope(backbone, tmp_path):
    backbone.model.save_pretrained(tmp_path)
    config, info = backbone.model.config, backbone.info
    spec = IndexerSpec(
        shape=IndexerConfig(heads=config.index_n_heads, rank=config.q_lora_rank, distance_bumps=0, scale=False,
                            slot=False),
        layers=LAYERS, hidden=info.hidden, window=8, key_width=info.key_width, key=info.key, rope=info.rope,
        chunking=Chunking(tokens=1, sink=0, recent=1), backbone=info.fingerprint,
    )  # fmt: skip
    indexer = MemoryIndexer.from_spec(spec, device="cpu").eval()
    initialise(indexer, tmp_path)
    settings = TraceConfig(chunking=spec.chunking, layers=LAYERS, window=8, tail=4, text_rows=8)
    raw = backbone.trace(ids(0, LENGTH)[0].tolist(), torch.tensor([LENGTH - 1]), settings)
    hidden, keys = (torch.stack([found[layer] for layer in LAYERS], dim=1) for found in (raw.hidden, raw.keys))
    queries = indexer.pack(hidden, raw.positions)
    ours = indexer.layer_logits(queries, keys.float().flatten(1), torch.arange(LENGTH))[:, 0].detach()
    parts = stock_parts(backbone.model, ids(0, LENGTH))
    for place, layer in enumerate(LAYERS):
        query = parts[layer, "wq_b"][-1].view(config.index_n_heads, -1)
        weights = parts[layer, "weights_proj"][-1] * (config.index_n_heads * config.index_head_dim) ** -0.5
        expected = (torch.relu(query @ parts[layer, "k_norm"].T) * weights[:, None]).sum(0)
        error = (ours[place] - expected).abs().max() / expected.abs().max()  # hidden states of traces are bf16
        assert float(error) < 2e-2 < float(expected.std() / expected.abs().max())


def test_layers_are_counted_by_number(backbone, tmp_path):
    backbone.model.save_pretrained(tmp_path)
    parts = read_native(tmp_path, LAYERS)
    for layer in LAYERS:
        assert torch.equal(parts[layer].wq_b, backbone.indexers[layer].wq_b.weight)
    with pytest.raises(InputError, match=r"has indexers in layers \[0, 1, 2, 3\]; \[4\] are not there"):
        read_native(tmp_path, [4])
