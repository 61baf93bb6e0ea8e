"""One value for a model in memory and its files; another one for any other weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from data_gen.backbones.dense import DenseBackbone
from data_gen.core.errors import InputError
from data_gen.core.fingerprint import checkpoint_tensors, fingerprint
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


def joined(tensors, rename=lambda name: name):
    """The tensors as engines hold them: q, k and v as one, gate and up as one; other names, another order."""
    rest, found = dict(tensors), {}
    for fused, members in {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }.items():
        for name in list(rest):
            if f".{members[0]}." in name:
                parts = [rest.pop(name.replace(members[0], member)) for member in members]
                found[name.replace(members[0], fused)] = torch.cat(parts)
    return {rename(name): value for name, value in [*found.items(), *reversed(rest.items())]}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_fused_tensors_agree(family):
    torch.manual_seed(0)
    biased = Qwen2ForCausalLM(Qwen2Config(**TINY, num_hidden_layers=2)) if family == "qwen2" else tiny_model(family)
    tensors = biased.state_dict()
    value = fingerprint(tensors.items())
    assert any("bias" in name for name in tensors) == (family == "qwen2")
    assert fingerprint(joined(tensors).items()) == value
    assert fingerprint(joined(tensors, lambda name: f"language_model.{name}").items()) == value


def test_a_stack_of_experts_agrees_with_its_parts_and_their_order_counts():
    tensors = dict(experts().state_dict())
    value, apart = fingerprint(tensors.items()), {}
    for name in [name for name in tensors if ".experts." in name]:
        stack, (layer, part) = tensors.pop(name), name.split(".experts.")
        for number, one in enumerate(stack):
            parts = zip(["w1", "w3"], one.chunk(2), strict=True) if part == "gate_up_proj" else [("w2", one)]
            apart |= {f"{layer}.experts.{number}.{each}.weight": value for each, value in parts}
    assert len(apart) == 2 * 4 * 3 and fingerprint((tensors | apart).items()) == value
    first, second = (f"model.layers.1.mlp.experts.{number}.w2.weight" for number in (0, 3))
    assert fingerprint((tensors | apart | {first: apart[second], second: apart[first]}).items()) != value


LAYER = "model.layers.1."
SWAPS = [
    ("self_attn.q_proj.weight", "self_attn.o_proj.weight"),
    ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ("input_layernorm.weight", "post_attention_layernorm.weight"),
    *((name, f"model.layers.2.{name}") for name in ("self_attn.o_proj.weight", "input_layernorm.weight")),
]


def distinct(family):
    """The tensors of a family, every one of them random: fresh norms are ones, and equal ones may change places."""
    generator = torch.Generator().manual_seed(1)
    state = tiny_model(family).state_dict()
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.mark.parametrize(("one", "two"), SWAPS)
def test_tensors_that_change_places_have_another_value(one, two):
    tensors = distinct("qwen3")
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.randn(64, 32)  # as wide as q: of one head more
    one, two = LAYER + one, two if two.startswith("model") else LAYER + two
    value = fingerprint(tensors.items())
    assert fingerprint((tensors | {one: tensors[two], two: tensors[one]}).items()) != value


def test_the_embedding_and_the_head_may_not_change_places():
    tensors, (one, two) = distinct("llama"), ("model.embed_tokens.weight", "lm_head.weight")
    assert fingerprint((tensors | {one: tensors[two], two: tensors[one]}).items()) != fingerprint(tensors.items())


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_that_change_places_have_another_value(axis):
    tensors = distinct("llama")
    seen = {fingerprint(tensors.items())}
    matrices = [name for name, value in tensors.items() if value.ndim == 2]
    for count, name in enumerate(matrices, start=2):
        width = tensors[name].shape[axis]
        order = torch.arange(width)
        order[[width // 3, width - 1]] = order[[width - 1, width // 3]]
        seen.add(fingerprint((tensors | {name: tensors[name].index_select(axis, order)}).items()))
        assert len(seen) == count, name
    heads = tensors["model.layers.0.self_attn.q_proj.weight"].view(4, 16, 32)  # whole heads, as pruning moves them
    moved = {"model.layers.0.self_attn.q_proj.weight": heads[[1, 0, 2, 3]].reshape(64, 32)}
    assert fingerprint((tensors | moved).items()) not in seen


def test_layers_that_change_places_or_are_there_twice_have_another_value():
    tensors = distinct("llama")

    def with_layers(*numbers):
        rest = {name: value for name, value in tensors.items() if ".layers." not in name}
        for new, old in enumerate(numbers):
            own = {name: value for name, value in tensors.items() if f".layers.{old}." in name}
            rest |= {name.replace(f".layers.{old}.", f".layers.{new}."): value for name, value in own.items()}
        return fingerprint(rest.items())

    assert with_layers(0, 1, 2) == fingerprint(tensors.items())
    assert len({with_layers(*order) for order in [(0, 1, 2), (1, 0, 2), (0, 0, 1), (0, 1), (0, 1, 2, 2)]}) == 5


def test_deepseeks_own_names_agree_with_those_in_memory(tmp_path):
    model = tiny_model("deepseek_v4")
    model.save_pretrained(tmp_path)
    assert fingerprint(checkpoint_tensors(tmp_path)) == fingerprint(model.state_dict().items())


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
    assert fingerprint(checkpoint_tensors(tmp_path)) == DenseBackbone(family).info.fingerprint
    tied = AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    once = fingerprint(checkpoint_tensors(tmp_path / "tied"))
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # some write both
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    assert fingerprint(checkpoint_tensors(tmp_path / "tied")) == once == DenseBackbone(tied).info.fingerprint


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
