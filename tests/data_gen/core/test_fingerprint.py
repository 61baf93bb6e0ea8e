"""One value for a model in memory and its files; another one for any other weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from data_gen.backbones.dense import DenseBackbone
from data_gen.core.errors import InputError
from data_gen.core.fingerprint import checkpoint_fingerprint, checkpoint_tensors, fingerprint
from tests.conftest import TINY, tiny_model


def experts():
    """A random mixture of experts: one stack of tensors in memory, one file entry an expert."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**TINY, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture(params=["llama", "qwen3", "gemma3", "experts"])
def family(request):
    return experts() if request.param == "experts" else tiny_model(request.param)


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_memory_and_files_agree(family, tmp_path, shard):
    family.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    value = fingerprint(family.state_dict().items())
    assert fingerprint(checkpoint_tensors(tmp_path)) == value
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert fingerprint(loaded.state_dict().items()) == value
        assert fingerprint(loaded.named_parameters()) == value  # tied matrices once


def test_fused_tensors_agree():
    tensors = dict(tiny_model("llama").state_dict())
    value = fingerprint(tensors.items())
    fused = {}
    for layer in range(3):
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            parts = [tensors.pop(f"model.layers.{layer}.{name}.weight") for name in group]
            fused[f"{group[0]}.{layer}"] = torch.cat(parts)
    assert fingerprint([*fused.items(), *reversed(tensors.items())]) == value


def test_any_value_of_any_tensor_counts():
    tensors = {name: tensor.clone() for name, tensor in tiny_model("gemma3").state_dict().items()}
    seen = {fingerprint(tensors.items())}
    for count, name in enumerate(tensors, start=2):
        place = tensors[name].view(-1)
        place[-1 - count % place.numel()] += 0.5
        seen.add(fingerprint(tensors.items()))
        assert len(seen) == count, name


@pytest.mark.parametrize("change", ["adapter", "quantised", "merged", "less"])
def test_other_weights_have_another_value(change):
    model, name = tiny_model("llama"), "model.layers.1.mlp.down_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    value, weight = fingerprint(tensors.items()), tensors[name]
    if change == "adapter":
        weight += 0.01 * torch.outer(torch.ones(weight.shape[0]), torch.ones(weight.shape[1]))
    elif change == "quantised":
        tensors[name] = (weight * 8).round() / 8
    elif change == "merged":
        tensors[name] = 0.9 * weight + 0.1 * weight.roll(1, 0)
    else:
        del tensors[name]
    assert fingerprint(tensors.items()) != value


def test_what_is_beside_the_language_model_does_not_count():
    tensors = tiny_model("llama").state_dict()
    more = {
        "vision_tower.patch.weight": torch.ones(3, 3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    assert fingerprint((tensors | more).items()) == fingerprint(tensors.items())


def test_integers_and_scalars_count():
    packed = {
        "a": torch.arange(12, dtype=torch.int32).view(3, 4),
        "scale": torch.tensor(0.5),
        "none": torch.empty(0, 4),
    }
    assert fingerprint(packed.items()) != fingerprint((packed | {"scale": torch.tensor(0.25)}).items())
    assert fingerprint(packed.items()) != fingerprint((packed | {"a": packed["a"] + 1}).items())


def test_a_backbone_in_memory_and_its_files_agree(family, tmp_path):
    family.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(tmp_path) == DenseBackbone(family).info.fingerprint
    tied = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    once = checkpoint_fingerprint(tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # some write both
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    assert checkpoint_fingerprint(tmp_path / "tied") == once == DenseBackbone(tied).info.fingerprint


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="no values in memory"):
        fingerprint([("a", torch.empty(2, 2, device="meta"))])
    with pytest.raises(InputError, match="no tensor of a language model"):
        fingerprint([])
    with pytest.raises(InputError, match=r"model.safetensors: no such file"):
        list(checkpoint_tensors(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(InputError, match="damaged checkpoint"):
        list(checkpoint_tensors(tmp_path))
