"""Models that cannot be traced are refused when they are opened, by the name of what is in the way."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks import tiny_models
from benchmarks.tiny_models import tiny
from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import adapter, load_backbone, load_tokenizer
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.generate import generate
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
UNSUPPORTED = [
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "positions are added to its token embeddings"),
    ("BioGpt", {}, "positions are added to its token embeddings"),
    ("Bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "positions are added to its token"),
    ("XGLM", {"d_model": 32, "attention_heads": 4}, "does not go through transformers' attention interface"),
    ("GPTNeoX", {}, r"lies in layers\.0\.attention \(GPTNeoXAttention\), not in layers\[i\]\.self_attn$"),
    ("Bloom", {}, r"lies in h\.0\.self_attention \(BloomAttention\), .* adds a bias by distance \(alibi\)$"),
    ("Mpt", {"expansion_ratio": 2}, r"\(MptAttention\), .* adds a bias by distance \(position_bias\)$"),
    ("Falcon", {}, r"lies in h\.0\.self_attention \(FalconAttention\), not in layers\[i\]\.self_attn$"),
    ("Rwkv", {"attention_hidden_size": 32}, r"lies in blocks\.0\.attention \(RwkvSelfAttention\)"),
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


def test_positions_that_no_rotary_table_takes_out_are_refused():
    """An attention block that adds a position of its own to what it projects."""
    model = tiny_model("llama")
    attention = model.get_decoder().layers[1].self_attn
    stock = attention.forward

    def forward(hidden_states, *args, **kwargs):
        place = torch.arange(hidden_states.shape[1], device=hidden_states.device) / hidden_states.shape[1]
        return stock(hidden_states + place[:, None], *args, **kwargs)

    attention.forward = forward
    with pytest.raises(InputError, match="layer 1: its keys depend on the position even where rotary tables"):
        adapter(model)


def test_a_block_that_makes_other_keys_each_time_is_refused():
    model = tiny_model("llama")
    attention, times = model.get_decoder().layers[1].self_attn, []
    stock = attention.forward

    def forward(hidden_states, *args, **kwargs):
        times.append(1)
        return stock(hidden_states * len(times), *args, **kwargs)

    attention.forward = forward
    with pytest.raises(InputError, match="layer 1: a second run on the same hidden states gives other keys"):
        adapter(model)


def test_indexers_that_are_no_lightning_indexers_are_refused(monkeypatch):
    model = tiny("deepseek_v32")
    del model.get_decoder().layers[2].self_attn.indexer.k_norm
    with pytest.raises(InputError, match="layer 2: sparse attention chosen by DeepseekV32Indexer, which has no k_norm"):
        adapter(model)


def test_an_indexer_that_turns_its_keys_otherwise_is_refused(monkeypatch):
    model = tiny("deepseek_v32")
    module = sys.modules[type(model).__module__]
    stock = module.apply_rotary_pos_emb
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda q, k, cos, sin, **rest: (stock(q, q, cos, sin, **rest)[0], k * 1.5)
    )
    with pytest.raises(InputError, match="DeepseekV32Indexer rotates its keys in an unknown way"):
        adapter(model)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_take_the_keys_of_an_earlier_one_are_refused(family, monkeypatch):
    monkeypatch.setitem(tiny_models.SPECIAL, family, tiny_models.PER_LAYER_INPUT | tiny_models.SHARED_KEYS)
    with pytest.raises(InputError, match="layer 3 takes the keys of an earlier one"):
        adapter(tiny(family))


def test_a_cache_of_the_model_s_own_is_refused():
    with pytest.raises(InputError, match="it decodes into a MiniMaxCache of its own and takes no other") as caught:
        adapter(tiny("minimax"))
    assert "\n" not in str(caught.value)


def test_layers_that_keep_all_and_are_not_known_are_refused():
    """Blocks that MiniMax-M3's indexers pick: its full-attention layers alone could be evicted, under a mask of all."""
    with pytest.raises(InputError, match="layer 1 keeps the whole history, but no adapter knows its attention"):
        adapter(tiny("minimax_m3_vl_text"))


def test_layers_of_another_kind_are_named():
    """Zaya's have attention that looks back at all of the history, beside a state."""
    with pytest.raises(InputError, match=r"ZayaForCausalLM: no adapter for its layers, of kind hybrid$"):
        adapter(tiny("zaya"))


def test_attention_to_an_image_is_named():
    with pytest.raises(InputError, match=r"cross_attn \(MllamaTextCrossAttention\) attends to another input"):
        adapter(tiny("mllama"))


def test_several_streams_of_tokens_are_refused():
    with pytest.raises(InputError, match=r"not supported: it reads 4 streams of tokens at once, not one text$"):
        adapter(tiny("musicgen"))


def test_tensors_that_lie_nowhere_are_refused():
    model = tiny_model("llama")
    model.lm_head = model.lm_head.to("meta")
    with pytest.raises(InputError, match=r"1 tensors lie on no device \(meta: lm_head\.weight\)"):
        adapter(model)


def test_a_context_that_is_not_said_is_refused():
    model = tiny_model("llama")
    model.config.max_position_embeddings = 0
    with pytest.raises(InputError, match="max_position_embeddings 0, so its longest"):
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
    with pytest.raises(InputError, match="no adapter for its layers, of kind sliding_attention"):
        adapter(phi(63))


def test_keys_that_fp16_cannot_hold_are_said_when_traced():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[2].self_attn.k_proj.weight.mul_(1e6)
        model.get_decoder().layers[2].self_attn.q_proj.weight.mul_(1e-6)
    with pytest.raises(InputError, match=r"layer 2: its keys reach \d.*more than fp16"):
        adapter(model)


def test_they_are_said_of_any_traced_layer_when_a_document_comes_to_them():
    backbone = adapter(tiny_model("llama"))
    with torch.no_grad():
        backbone.model.get_decoder().layers[0].self_attn.k_proj.weight.mul_(1e6)
        backbone.model.get_decoder().layers[0].self_attn.q_proj.weight.mul_(1e-6)
    settings = TraceConfig(chunking=Chunking(tokens=4, sink=0, recent=0), layers=[0, 2], window=4, text_rows=8, tail=4)
    with pytest.raises(InputError, match=r"layer 0: its keys reach \d.*more than fp16"):
        backbone.trace(list(range(40)), torch.arange(30, 40), settings)


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


def test_tensors_that_the_model_does_not_know_are_named(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    more = {"vision_tower.patch.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | more, path, {"format": "pt"})
    assert load_backbone(BackboneConfig(path=str(saved)))[0].config.model_type == "llama"  # beside the language model
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, path, {"format": "pt"})
    unknown = r"LlamaForCausalLM does not have 1 tensors of the checkpoint \(model\.layers\.0\.self_attn\.q_norm"
    with pytest.raises(InputError, match=unknown):
        load_backbone(BackboneConfig(path=str(saved)))


def test_a_pickled_file_is_no_substitute_for_weights(saved):
    path = saved / "model.safetensors"
    torch.save(load_file(path), saved / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_backbone(BackboneConfig(path=str(saved)))


@pytest.mark.parametrize("context", [1 << 70, 1 << 31, 0, -1])
def test_a_context_that_no_text_has_is_refused(context):
    model = tiny_model("llama")
    model.config.max_position_embeddings = context
    with pytest.raises(InputError, match=f"max_position_embeddings {context}"):
        adapter(model)


SAME = {"transformers_version": "0", "use_cache": False, "architectures": ["Other"], "eos_token_id": 5}
OTHER = [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"max_position_embeddings": 500}]


def test_another_configuration_is_another_backbone(saved):
    def info(**changes):
        damaged_config(saved, lambda config: whole | changes)
        return DenseBackbone(load_backbone(BackboneConfig(path=str(saved)))[0]).info

    whole = json.loads((saved / "config.json").read_text())
    assert info() == DenseBackbone(tiny_model("llama")).info == info(**SAME)
    others = [
        info(rope_parameters=whole["rope_parameters"] | one) if "rope_theta" in one else info(**one) for one in OTHER
    ]
    assert len({each.config for each in others} | {info().config}) == 1 + len(OTHER)
    assert {each.fingerprint for each in others} == {info().fingerprint}


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


@pytest.mark.parametrize("length", ["x", [None]])
def test_a_tokenizer_whose_settings_fail_in_use_is_one_line(saved, length):
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    with pytest.raises(InputError, match=f"backbone {saved} "):
        load_backbone(BackboneConfig(path=str(saved)))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_folder_is_one_line(saved, damage):
    damaged_config(saved, DAMAGE[damage])
    with pytest.raises(InputError, match=f"backbone {saved} ") as caught:
        load_backbone(BackboneConfig(path=str(saved)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [load_backbone, load_tokenizer])
def test_more_layers_than_any_model_has_are_not_built(saved, read):
    config = json.loads((saved / "config.json").read_text())
    for settings in (config | {"num_hidden_layers": 2**31}, config | {"text_config": {"num_experts": 2**31}}):
        (saved / "config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match=r"says num_\w+ 2147483648, which is more than any model has"):
            read(BackboneConfig(path=str(saved)))


def test_tokens_beyond_the_vocabulary_are_named(tokenizer, tiny_recipe, tmp_path):
    torch.manual_seed(0)
    settings = TINY | {"vocab_size": 90, "num_hidden_layers": 3}
    backbone = DenseBackbone(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval())
    with pytest.raises(InputError, match=r"train-text-0000000: token \d+ \('.'\) is beyond .* vocabulary of 90"):
        generate(backbone, tokenizer, tiny_recipe.documents, tiny_recipe.trace, tmp_path)


def test_what_is_supported_passes(model):
    assert replace(adapter(model).info) == DenseBackbone(model).info
