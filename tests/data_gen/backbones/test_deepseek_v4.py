"""Mechanics of the DeepSeek-V4 tracer on random weights; test_deepseek_v4_pocket.py has the truth of trained ones."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import data_gen.backbones.deepseek_v4 as tracer
import eval.plan
from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone, IndexerOracle
from data_gen.backbones.deepseek_v4_hooks import csa_layers, observe_csa
from data_gen.backbones.load import adapter, load_backbone
from data_gen.config import BackboneConfig, TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.labels import SparseOracle
from tests.conftest import TINY_V4, tiny_model
from tests.data_gen.traces.spread import spread

LENGTH = 150
IDS = torch.randint(0, 128, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()
ROWS = torch.arange(60, LENGTH)


def settings(**changes):
    chosen = {"chunking": Chunking(tokens=4, sink=1, recent=2), "layers": [1, 3], "oracle": "indexer", "window": 8}
    return TraceConfig(**(chosen | {"tail": 4, "text_rows": 32, "top_chunks": 100} | changes))


@pytest.fixture(scope="module")
def model():
    return tiny_model("deepseek_v4")


def test_what_top_chunks_leaves_out_is_counted(model):
    backbone = DeepseekV4Backbone(model)
    whole = backbone.trace(IDS, ROWS, settings(oracle="attention")).oracle
    cut = backbone.trace(IDS, ROWS, settings(oracle="attention", top_chunks=5)).oracle
    assert int(cut.pointers.diff().max()) == 5 < int(whole.pointers.diff().min())
    (everything, peaks), (kept, kept_peaks) = (spread(SparseOracle.of(oracle, LENGTH // 4)) for oracle in (whole, cut))
    everything, kept = everything.sum(dim=1), kept.sum(dim=1)
    torch.testing.assert_close(kept + cut.rest, everything, atol=2e-3, rtol=0)
    best = peaks.topk(5, dim=1).values.sum(dim=1)
    torch.testing.assert_close(kept_peaks.sum(dim=1), best, atol=2e-3, rtol=0)


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("oracle", ["indexer", "attention"])
def test_pieces_of_any_size_give_one_trace(model, monkeypatch, piece, oracle):
    backbone = DeepseekV4Backbone(model)
    ids, rows = IDS[:60], torch.arange(60)  # the first tokens see no chunk
    whole = backbone.trace(ids, rows, settings(oracle=oracle))
    monkeypatch.setattr(tracer, "PIECE_TOKENS_CPU", piece)
    pieces = backbone.trace(ids, rows, settings(oracle=oracle))
    for layer in (1, 3):
        torch.testing.assert_close(pieces.hidden[layer], whole.hidden[layer], atol=2e-2, rtol=2e-2)
        same = (pieces.keys[layer] == whole.keys[layer]).float().mean()
        assert same > 0.9  # a value at the edge of an fp8 step may fall either way
    assert torch.equal(pieces.oracle.pointers, whole.oracle.pointers)
    assert torch.equal(pieces.oracle.chunks, whole.oracle.chunks)


def test_pieces_shrink_as_keys_grow(model, monkeypatch):
    sizes = []
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: sizes.append(args[0].shape[1]),
                                                         with_kwargs=True)  # fmt: skip
    monkeypatch.setattr(tracer, "PIECE_TOKENS_CPU", 32)
    monkeypatch.setattr(tracer, "PIECE_ELEMENTS_CPU", 16 * 32 * 56)
    DeepseekV4Backbone(model).trace(IDS, ROWS, settings())
    hook.remove()
    assert sum(sizes) == LENGTH and sizes[0] == 32 and sizes[-2] < 26
    assert all(16 * size * ((start + 32) // 4 + 48) <= 16 * 32 * 56
               for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False))  # fmt: skip


def test_observing_changes_no_bit(model):
    ids = torch.tensor([IDS])
    calls = []
    with torch.no_grad():
        before = model(ids).logits
        with observe_csa(model, calls.append):
            during = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert [call.ordinal for call in calls] == [0, 1, 2, 3]


def test_a_model_can_write_and_be_traced_in_one_reading(model, monkeypatch):
    backbone = DeepseekV4Backbone(model)
    read = []
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: read.append(args[0].shape[1]),
                                                         with_kwargs=True)  # fmt: skip
    tokens, own = backbone.trace_own(IDS, settings(own_tokens=30, answer_lead=5))
    hook.remove()
    assert sum(read) == len(tokens) - 1  # the last one answers nothing
    ids = torch.tensor([IDS])
    stock = model.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))
    assert tokens == stock[0].tolist()
    assert own.positions.tolist() == list(range(LENGTH - 5, len(tokens) - 1))
    forced = backbone.trace(tokens, own.positions, settings())
    assert torch.equal(own.oracle.pointers, forced.oracle.pointers)
    assert torch.equal(own.oracle.chunks, forced.oracle.chunks)
    assert torch.equal(own.oracle.votes, forced.oracle.votes)
    torch.testing.assert_close(own.hidden[1], forced.hidden[1], atol=2e-2, rtol=2e-2)


def test_writing_stops_at_the_end_token(model):
    backbone = DeepseekV4Backbone(model)
    free, _ = backbone.trace_own(IDS, settings(own_tokens=12))
    stop = free[LENGTH + 4]
    model.generation_config.eos_token_id = [stop, 5000]
    tokens, raw = backbone.trace_own(IDS, settings(own_tokens=12))
    model.generation_config.eos_token_id = 1
    assert tokens == free[: free.index(stop, LENGTH) + 1]
    assert int(raw.positions[-1]) == len(tokens) - 2


def changed(**changes):
    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(DeepseekV4Config(**(copy.deepcopy(TINY_V4) | changes))).eval()


def test_other_shapes_work_too():
    plain = changed(rope_parameters=None, compress_rates={"compressed_sparse_attention": 8,
                    "heavily_compressed_attention": 32}, index_head_dim=32, index_topk=3, hidden_size=48)  # fmt: skip
    backbone = DeepseekV4Backbone(plain)
    assert backbone.info.rope.factor == 1.0 and backbone.info.hidden == 48
    raw = backbone.trace(IDS, ROWS, settings(chunking=Chunking(tokens=8, sink=0, recent=0)))
    assert raw.keys[1].shape == (LENGTH // 8, 36)


@pytest.mark.parametrize(("name", "layers", "top_k"), [("flash", 21, 512), ("pro", 30, 1024)])
def test_the_published_models_layers_and_indexers(name, layers, top_k):
    """Their own config.json, narrow everywhere but in the indexer: 64 heads of 128, all layers in their order."""
    config = json.loads((Path(eval.plan.__file__).parent / "configs" / f"deepseek-v4-{name}.json").read_text())
    narrow = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 64, "q_lora_rank": 16,
              "o_groups": 1, "o_lora_rank": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "hc_mult": 2,
              "moe_intermediate_size": 8, "hc_sinkhorn_iters": 2, "initializer_range": 0.3}  # fmt: skip
    del config["quantization_config"], config["dtype"]
    torch.manual_seed(0)
    backbone = DeepseekV4Backbone(DeepseekV4ForCausalLM(DeepseekV4Config(**config | narrow)))
    assert backbone.info.full_layers == list(range(layers)) and backbone.info.context == 1 << 20
    assert [backbone.layers[ordinal] for ordinal in (10, 12, 20)] == [22, 26, 42]
    assert backbone.info.rope == V4_FLASH.rope and backbone.info.key_width == 128
    assert IndexerOracle(backbone.model.config.index_topk, 3).top_k == top_k
    trace = settings(layers=[10, 12, 20], chunking=Chunking(tokens=4, sink=0, recent=2))
    raw = backbone.trace(IDS, ROWS[-10:], trace)
    assert raw.keys[20].shape == (LENGTH // 4, 132) and raw.native[12, 0].query.shape == (64, 128)
    assert 3 <= int(raw.oracle.votes.min()) < int(raw.oracle.votes.max()) <= layers


@pytest.mark.parametrize(("dtype", "devices"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_a_saved_checkpoint_loads_and_traces(tmp_path, model, tokenizer, dtype, devices):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_backbone(BackboneConfig(path=str(tmp_path), dtype=dtype, spread=devices))
    backbone = adapter(loaded)
    assert backbone.info == DeepseekV4Backbone(model).info  # the fingerprint survives the cast
    raw = backbone.trace(IDS, ROWS, settings(oracle="attention"))
    mass, _ = spread(SparseOracle.of(raw.oracle, LENGTH // 4))
    assert raw.hidden[1].shape == (len(ROWS), 32) and torch.all(mass.sum(dim=1) > 0)


def test_exact_ties_are_counted_not_refused(model):
    flat = changed()
    scorer = flat.get_decoder().layers[csa_layers(flat)[2]].self_attn.compressor.indexer.scorer
    torch.nn.init.zeros_(scorer.weights_proj.weight)
    raw = DeepseekV4Backbone(flat).trace(IDS, ROWS, settings())
    assert 0 <= raw.near_ties <= len(ROWS)


def test_an_unknown_term_of_the_indexer_is_refused():
    strange = changed()
    scorer = strange.get_decoder().layers[csa_layers(strange)[2]].self_attn.compressor.indexer.scorer
    hook = scorer.register_forward_hook(lambda _, __, output: output + torch.arange(output.shape[-1]) * 0.3)
    with pytest.raises(InputError, match="CSA layer 2: the recomputed top-12 differs"):
        DeepseekV4Backbone(strange).trace(IDS, ROWS, settings())
    hook.remove()


def test_bad_input_is_named(model):
    backbone = DeepseekV4Backbone(model)
    with pytest.raises(InputError, match=r"\[4\] are not among the 4 CSA layers"):
        backbone.trace(IDS, ROWS, settings(layers=[0, 4]))
    with pytest.raises(InputError, match="must be 4"):
        backbone.trace(IDS, ROWS, settings(chunking=Chunking(tokens=16)))
    with pytest.raises(InputError, match="context is 2048"):
        backbone.trace(IDS * 14, ROWS, settings())
    few = changed(layer_types=["compressed_sparse_attention"] + ["sliding_attention"] * 6)
    with pytest.raises(InputError, match="votes: 3 CSA layers have to agree, but the backbone has 1"):
        DeepseekV4Backbone(few).trace(IDS, ROWS, settings(layers=[0]))
    with pytest.raises(InputError, match="nothing to index"):
        DeepseekV4Backbone(changed(layer_types=["sliding_attention"] * 7))
    with pytest.raises(InputError, match="was it cast to bf16 after loading"):
        DeepseekV4Backbone(changed().to(torch.bfloat16))
