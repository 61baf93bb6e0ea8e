"""Models that cannot be traced are refused when they are opened, by the name of what is in the way."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.generate import prepare
from tests.conftest import TINY, tiny_model

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
DSA = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
UNSUPPORTED = [
    ("DeepseekV2", MLA | MOE, "MLA"),
    ("DeepseekV3", MLA | MOE, "MLA"),
    ("MiniCPM3", MLA, "MLA"),
    ("DeepseekV32", MLA | MOE | DSA, "DSA"),
    ("GlmMoeDsa", MLA | MOE | DSA, "DSA"),
    ("Phi", {}, "partial rotary"),
    ("StableLm", {}, "partial rotary"),
    ("Persimmon", {}, "partial rotary"),
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "learned positions"),
    ("BioGpt", {}, "learned positions"),
    ("NanoChat", {}, "norm of keys without weight"),
    ("Doge", {}, "dynamic mask"),
    ("DiffLlama", {}, "differential attention"),
]


def random_model(family, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize(("family", "settings", "term"), UNSUPPORTED, ids=[family for family, *_ in UNSUPPORTED])
def test_the_term_is_named(family, settings, term):
    with pytest.raises(InputError, match=term) as caught:
        adapter(random_model(family, settings))
    assert "\n" not in str(caught.value) and family in str(caught.value)


def test_a_model_of_another_shape_is_refused():
    for family, settings in (("GPTNeoX", {}), ("Bloom", {}), ("XGLM", {"d_model": 32, "attention_heads": 4})):
        with pytest.raises(InputError) as caught:
            adapter(random_model(family, settings))
        assert family in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_lie_nowhere_are_refused():
    model = tiny_model("llama")
    model.lm_head = model.lm_head.to("meta")
    with pytest.raises(InputError, match=r"1 tensors lie on no device \(meta: lm_head\.weight\)"):
        adapter(model)


def test_a_context_that_is_not_said_is_refused():
    model = tiny_model("llama")
    model.config.max_position_embeddings = 0
    with pytest.raises(InputError, match="max_position_embeddings 0, so how long"):
        adapter(model)


def test_a_window_as_long_as_the_context_is_none():
    def phi(window):
        return random_model("Phi3", {"sliding_window": window, "max_position_embeddings": 64})

    backbone = adapter(phi(64))
    assert backbone.info.full_layers == [0, 1]
    settings = TraceConfig(chunking=Chunking(tokens=4, sink=0, recent=0), layers=[1], window=4, tail=4, text_rows=4)
    tokens = torch.randint(0, 128, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = adapter(phi(None)).trace(tokens, torch.arange(60, 64), settings)
    assert torch.equal(backbone.trace(tokens, torch.arange(60, 64), settings).oracle.peak, whole.oracle.peak)
    with pytest.raises(InputError, match="no full-attention layer"):
        adapter(phi(63))


def test_keys_that_fp16_cannot_hold_are_said_when_traced():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[2].self_attn.k_proj.weight.mul_(1e6)
        model.get_decoder().layers[2].self_attn.q_proj.weight.mul_(1e-6)
    with pytest.raises(InputError, match=r"layer 2: its keys reach \d.*more than the fp16"):
        adapter(model)


@pytest.mark.parametrize("family", ["llama", "deepseek_v4"])
def test_a_model_whose_output_is_none_is_called_that(family):
    model = tiny_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = torch.nan
    with pytest.raises(InputError, match="hidden states are NaN or infinite"):
        adapter(model)


@pytest.mark.parametrize("part", ["down_proj", "lm_head"])
def test_so_is_one_whose_last_layers_make_it_so(part):
    model = tiny_model("llama")
    module = model.lm_head if part == "lm_head" else model.get_decoder().layers[-1].mlp.down_proj
    with torch.no_grad():
        module.weight[3] = torch.nan
    with pytest.raises(InputError, match="its output is NaN or infinite"):
        adapter(model)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A folder with a tiny Llama."""
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_that_is_not_whole_is_refused(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if "layers.1.mlp" not in name}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"not whole: 3 tensors of the model are missing \(model\.layers\.1\.mlp"):
        load_backbone(BackboneConfig(path=str(saved)))
    save_file({f"base_model.{name}.lora": value for name, value in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"not whole: .* that the model does not know \(base_model\."):
        load_backbone(BackboneConfig(path=str(saved)))
    save_file(tensors, path, {"format": "pt"})
    assert load_backbone(BackboneConfig(path=str(saved)))[0].config.model_type == "llama"


def damaged_config(saved, change):
    path = saved / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


DAMAGE = {
    "a list": lambda config: [config],
    "a number": lambda config: 3,
    "another shape": lambda config: config | {"hidden_size": 64},
    "a quantisation that is not installed": lambda config: config | {"quantization_config": {"quant_method": "awq"}},
    "no type": lambda config: {name: value for name, value in config.items() if name != "model_type"},
    "a context of null": lambda config: config | {"max_position_embeddings": None},
    "layers in words": lambda config: config | {"num_hidden_layers": "three"},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_folder_is_one_line(saved, damage):
    damaged_config(saved, DAMAGE[damage])
    with pytest.raises(InputError, match=f"backbone {saved} ") as caught:
        load_backbone(BackboneConfig(path=str(saved)))
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary_are_named(tokenizer, tiny_recipe):
    torch.manual_seed(0)
    settings = TINY | {"vocab_size": 90, "num_hidden_layers": 3}
    backbone = DenseBackbone(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval())
    with pytest.raises(InputError, match=r"train-text-0000: token \d+ \('.'\) is beyond the model's vocabulary of 90"):
        prepare(backbone, tokenizer, tiny_recipe.documents, tiny_recipe.trace, "train")


def test_what_is_supported_passes(model):
    assert replace(adapter(model).info) == DenseBackbone(model).info
