"""Weights from a configuration, against transformers' modules, DeepSeek's statements and the published files."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from eval.plan import make_plan
from eval.plan.load import SHIPPED, load_model

GIB = 2**30


def weight_sum(model, field):
    return sum(getattr(weight, field) for weight in model.weights)


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_shipped_configurations_have_as_many_weights_as_the_module(name):
    config = AutoConfig.from_pretrained(str(SHIPPED / f"{name}.json"))
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    assert weight_sum(load_model(name, None), "values") == sum(tensor.numel() for tensor in state.values())


def test_tiny_models_have_as_many_weights_as_the_module(tiny):
    module, folder = tiny
    tensors = {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}  # a tied head counts once
    assert weight_sum(load_model(folder, None), "values") == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("name", "total", "active"), [("deepseek-v4-flash", 284e9, 13e9), ("deepseek-v4-pro", 1.6e12, 49e9)]
)
def test_shipped_configurations_are_as_large_as_deepseek_says(name, total, active):
    model = load_model(name, None)
    assert weight_sum(model, "values") == pytest.approx(total, rel=0.02)
    assert weight_sum(model, "used") == pytest.approx(active, rel=0.025)


def test_v4_flash_takes_the_bytes_of_the_published_checkpoint():
    # total_size of model.safetensors.index.json, less its tensors mtp.* (a layer with a full expert block and no
    # compressor, two square projections, and a stream head of its own), taken from the shapes in their headers.
    linear = [(1024, 4096), (32768, 1024), (512, 4096), (8192, 4096), (4096, 8192), (4096, 4096), (4096, 4096)]
    linear += [(2048, 4096), (2048, 4096), (4096, 2048)]
    fp8 = sum(rows * columns + rows * columns // 128**2 for rows, columns in linear)
    fp4 = 256 * 3 * (4096 * 2048 // 2 + 4096 * 2048 // 32)
    bf16 = 2 * (256 * 4096 + 5 * 4096 + 1024 + 512)
    fp32 = 4 * (64 + 256 + 2 * (24 * 16384 + 24 + 3) + 4 * 16384 + 4 + 1)
    assert weight_sum(load_model("deepseek-v4-flash", None), "stored") == 159_609_485_896 - (fp8 + fp4 + bf16 + fp32)


def test_v4_pro_takes_the_bytes_of_the_published_checkpoint():
    linear = [(1536, 7168), (65536, 1536), (512, 7168), (16384, 4096), (7168, 16384), (7168, 7168), (7168, 7168)]
    linear += [(3072, 7168), (3072, 7168), (7168, 3072)]
    fp8 = sum(rows * columns + rows * columns // 128**2 for rows, columns in linear)
    fp4 = 384 * 3 * (7168 * 3072 // 2 + 7168 * 3072 // 32)
    bf16 = 2 * (384 * 7168 + 5 * 7168 + 1536 + 512)
    fp32 = 4 * (128 + 384 + 2 * (24 * 28672 + 24 + 3) + 4 * 28672 + 4 + 1)
    next_token = fp8 + fp4 + bf16 + fp32
    stored = weight_sum(load_model("deepseek-v4-pro", None), "stored")
    assert (stored + next_token) / GIB == pytest.approx(805.32, abs=0.005)


def test_weight_bytes_follow_the_dtype(tmp_path, tiny):
    module, folder = tiny
    wide = make_plan(folder, [64]).rows[0]["weights_gb"]
    module.config.dtype = torch.bfloat16
    module.config.save_pretrained(tmp_path / "half")
    narrow = make_plan(str(tmp_path / "half"), [64]).rows[0]["weights_gb"]
    assert narrow < wide
    if module.config.model_type != "deepseek_v4":  # which keeps some of its weights in fp32 whatever the dtype
        assert narrow == wide / 2
