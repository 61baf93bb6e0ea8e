"""The dense adapter against the backbone's own eager attention weights."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.tiny_models import tiny
from data_gen.backbones.dense import DenseBackbone
from data_gen.backbones.load import adapter
from data_gen.backbones.observe import observe
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.traces.labels import SparseOracle
from tests.conftest import tiny_model
from tests.data_gen.traces.spread import spread


def tokens(length):
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(3)).tolist()


def trace_config(backbone, **changes):
    settings = {"chunking": Chunking(tokens=4, sink=1, recent=2), "layers": backbone.info.full_layers[-1:]}
    return TraceConfig(**(settings | {"window": 8, "tail": 4, "text_rows": 16, "top_chunks": 1000} | changes))


def test_probabilities_are_the_backbones_own(model):
    backbone = DenseBackbone(model)
    ids = tokens(90)
    rows = torch.tensor([5, 40, 88])
    raw = backbone.trace(ids, rows, trace_config(backbone))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_attentions=True)
    mean, peak = spread(SparseOracle.of(raw.oracle, 22))
    for index, row in enumerate(rows.tolist()):
        complete = (row + 1) // 4
        layers = [output.attentions[layer][0] for layer in backbone.info.full_layers]
        weights = torch.stack([layer[:, row, : complete * 4] for layer in layers])
        pooled = weights.unflatten(-1, (complete, 4)).sum(-1)  # [layers, H, complete]
        torch.testing.assert_close(mean[index, :complete], pooled.mean((0, 1)), atol=2e-4, rtol=2e-3)
        torch.testing.assert_close(peak[index, :complete], pooled.amax(1).mean(0), atol=2e-4, rtol=2e-3)
        assert not mean[index, complete:].any()


def test_keys_are_pooled_before_rope(model):
    backbone = DenseBackbone(model)
    layer = backbone.info.full_layers[-1]
    module = backbone.modules[layer]
    seen = []
    hook = module.k_proj.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    raw = backbone.trace(tokens(90), torch.tensor([89]), trace_config(backbone))
    hook.remove()
    keys = seen[0].unflatten(-1, (2, 16))  # [S, KV, d]
    keys = module.k_norm(keys) if hasattr(module, "k_norm") else keys
    expected = keys[:88].unflatten(0, (22, 4)).mean(1).flatten(1)
    torch.testing.assert_close(raw.keys[layer].float(), expected, atol=2e-3, rtol=2e-3)


def test_hidden_states_enter_the_attention_block(model):
    backbone = DenseBackbone(model)
    layer = backbone.info.full_layers[-1]
    seen = []
    norm = model.get_decoder().layers[layer].input_layernorm
    hook = norm.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    raw = backbone.trace(tokens(60), torch.tensor([10, 59]), trace_config(backbone))
    hook.remove()
    assert torch.equal(raw.hidden[layer], seen[0][[10, 59]].bfloat16())


def test_observing_changes_no_bit(model):
    ids = torch.tensor([tokens(50)])
    calls = []
    with torch.no_grad():
        stock = model(ids).logits
        with observe(model, calls.append):
            observed = model(ids).logits
        again = model(ids).logits
    assert torch.equal(stock, observed)
    assert torch.equal(stock, again)
    assert [call.layer for call in calls] == DenseBackbone(model).info.full_layers


def test_fingerprint_survives_a_cast_and_tells_models_apart():
    model = tiny_model("llama")
    before = DenseBackbone(model).info.fingerprint
    assert before == DenseBackbone(tiny_model("llama").bfloat16()).info.fingerprint
    assert before != DenseBackbone(tiny_model("qwen3")).info.fingerprint
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[7, 3] += 1
    assert before != DenseBackbone(model).info.fingerprint


def test_bad_input_is_named(model):
    backbone = DenseBackbone(model)
    with pytest.raises(InputError, match="context is 512"):
        backbone.trace(tokens(513), torch.tensor([512]), trace_config(backbone))
    with pytest.raises(InputError, match="not full-attention layers"):
        backbone.trace(tokens(90), torch.tensor([89]), trace_config(backbone, layers=[99]))


def test_an_unknown_attention_term_is_refused(model, monkeypatch):
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def biased(module, query, key, value, mask, **kwargs):
        return stock(module, query, key * 1.5, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", biased)
    backbone = DenseBackbone(model)
    with pytest.raises(InputError, match="recomputed attention differs"):
        backbone.trace(tokens(60), torch.tensor([59]), trace_config(backbone))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is biased


def test_a_model_can_be_traced_on_its_own_words(model):
    backbone = DenseBackbone(model)
    prompt = tokens(60)
    written, raw = backbone.trace_own(prompt, trace_config(backbone, own_tokens=12, answer_lead=5))
    assert written[:60] == prompt and 60 < len(written) <= 72
    assert raw.positions.tolist() == list(range(55, len(written) - 1))
    forced = backbone.trace(written, raw.positions, trace_config(backbone))
    assert torch.equal(raw.oracle.peak, forced.oracle.peak)


def test_dense_backbones_have_no_indexer_to_ask(model):
    backbone = DenseBackbone(model)
    with pytest.raises(InputError, match="the backbone has no indexer"):
        backbone.trace(tokens(60), torch.tensor([59]), trace_config(backbone, oracle="indexer"))


@pytest.mark.parametrize("family", ["smollm3", "phi", "stablelm", "llama4_text"])
def test_keys_are_projections_whatever_part_of_them_turns(family):
    """Layers with RoPE on a part of each head, and without any: a chunk's key is the mean of `k_proj`."""
    model = tiny(family)
    backbone = adapter(model)
    ids = tokens(60)
    for layer in backbone.info.full_layers:
        seen = []
        hook = backbone.modules[layer].k_proj.register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output)
        )
        raw = backbone.trace(ids, torch.tensor([59]), trace_config(backbone, layers=[layer]))
        hook.remove()
        projected = seen[0][0, :60].unflatten(0, (15, 4)).mean(1)
        torch.testing.assert_close(raw.keys[layer].float(), projected, atol=2e-3, rtol=2e-3)


def test_a_nope_layer_of_smollm3_is_among_them():
    config = tiny("smollm3").config
    assert 0 in config.no_rope_layers and 1 in config.no_rope_layers


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu"])
def test_mla_keys_are_mean_latents(family):
    """What its norm makes of the compressed key and value, before any head expands it."""
    model = tiny(family)
    backbone = adapter(model)
    module = backbone.modules[3]
    seen = []
    hook = module.kv_a_layernorm.register_forward_hook(lambda _, __, output: seen.append(output))
    raw = backbone.trace(tokens(60), torch.tensor([59]), trace_config(backbone))
    hook.remove()
    latent = seen[0].reshape(60, -1)
    assert latent.shape[1] == model.config.kv_lora_rank == backbone.info.key_width
    torch.testing.assert_close(raw.keys[3].float(), latent.unflatten(0, (15, 4)).mean(1), atol=2e-3, rtol=2e-3)


def test_each_attention_block_is_a_layer_where_a_decoder_layer_holds_two():
    """LongCat-Flash: counted as its cache counts them, with the states that enter each block."""
    model = tiny("longcat_flash")
    backbone = adapter(model)
    blocks = [block for layer in model.model.layers for block in layer.self_attn]
    assert backbone.info.full_layers == [block.layer_idx for block in blocks] == list(range(8))
    entered = {}
    for place, norm in enumerate(norm for layer in model.model.layers for norm in layer.input_layernorm):
        norm.register_forward_hook(lambda _, __, output, place=place: entered.update({place: output[0]}))
    raw = backbone.trace(tokens(60), torch.arange(50, 60), trace_config(backbone, layers=[2, 3]))
    for place in (2, 3):
        torch.testing.assert_close(raw.hidden[place].float(), entered[place][50:], atol=2e-2, rtol=2e-2)


def test_mean_pooled_scores_of_mla_are_those_of_its_heads():
    """Against keys of heads that the model itself expanded, averaged; the part that turns left out."""
    model = tiny("deepseek_v3")
    backbone = adapter(model)
    module, seen = backbone.modules[3], []
    hooks = [
        part.register_forward_hook(lambda _, __, output: seen.append(output))
        for part in (module.kv_b_proj, module.q_b_proj)
    ]
    raw = backbone.trace(tokens(60), torch.tensor([59]), trace_config(backbone))
    for hook in hooks:
        hook.remove()
    config = model.config
    keys = next(out for out in seen if out.shape[-1] == 4 * (config.qk_nope_head_dim + config.v_head_dim))
    keys = keys.reshape(60, 4, -1)[..., : config.qk_nope_head_dim].unflatten(0, (15, 4)).mean(1)  # [N, H, d]
    query = next(out for out in seen if out.shape[-1] == 4 * (config.qk_nope_head_dim + config.qk_rope_head_dim))
    query = query.reshape(60, 4, -1)[59, :, : config.qk_nope_head_dim]
    expected = (torch.einsum("hd,nhd->hn", query, keys) * module.scaling).softmax(-1).mean(0)
    layers = len(backbone.modules)
    others = raw.mean_pooled.float() * layers - expected  # the sum over the layers before
    assert others.min() > -2e-2 and float(others.sum()) == pytest.approx(layers - 1, abs=2e-2)
