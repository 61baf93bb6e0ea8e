"""Where a random model's layers lie changes neither weights nor traces; on two GPUs only the command shows it."""

import copy

import pytest
import torch
from transformers import DeepseekV4Config

from benchmarks import spread
from data_gen.backbones.load import adapter
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from tests.conftest import TINY_V4


def test_the_first_layers_have_the_real_widths():
    config = spread.real_widths(6)
    assert config.layer_types.count("compressed_sparse_attention") == 2
    assert (config.hidden_size, config.num_attention_heads, config.n_routed_experts) == (4096, 64, 256)


@pytest.fixture
def traces():
    settings = TraceConfig(chunking=Chunking(tokens=4, sink=0, recent=2), layers=[0, 1], oracle="indexer", votes=1)
    document = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(0)).tolist()

    def of(devices):
        model = spread.random_model(DeepseekV4Config(**copy.deepcopy(TINY_V4)), devices)
        assert model.model.layers[0].self_attn.q_a_proj.weight.float().std() > 0.1  # random, not what memory held
        return adapter(model).trace(document, torch.arange(150, 200), settings)

    return of


def test_layers_on_two_devices_trace_alike(traces):
    one = spread.digest(traces(["cpu"]))
    assert spread.digest(traces(["cpu", "cpu"])) == one


def test_another_trace_has_another_digest(traces):
    trace = traces(["cpu"])
    before = spread.digest(trace)
    trace.oracle.votes[0] += 1
    assert spread.digest(trace) != before
