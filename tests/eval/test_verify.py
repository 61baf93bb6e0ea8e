"""`lookahead verify` passes what is right, and finds what was tampered with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from typer.testing import CliRunner

import indexer_train.model
from cli import app
from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.chunks import Chunking
from data_gen.config import TraceConfig
from data_gen.errors import InputError
from data_gen.flashmemory.document import V4_FLASH
from data_gen.key_codec import encode_keys
from data_gen.rope import Rope
from data_gen.store import DocumentMeta, Manifest, Span, TraceStore
from data_gen.trace import NativeRow, RawTrace
from data_gen.votes import GoldenChunks
from eval.reference import layer_logits, reference_scores
from eval.verify import verify_indexer, verify_native
from indexer_train.bridge.bundle import export_bundle
from indexer_train.bridge.native import initialise
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer

GOLDEN = Path(__file__).parents[1] / "golden" / "parity.safetensors"


def new_indexer(store, seed=0, **shape):
    manifest = store.manifest
    torch.manual_seed(seed)
    spec = IndexerSpec(
        shape=IndexerConfig(**{"heads": 6, "rank": 8} | shape),
        layers=manifest.trace.layers,
        hidden=manifest.backbone.hidden,
        key_width=manifest.backbone.key_width,
        chunking=manifest.trace.chunking,
        window=manifest.trace.window,
        backbone=manifest.backbone.fingerprint,
        key=manifest.backbone.key,
        rope=manifest.backbone.rope,
    )
    indexer = MemoryIndexer.from_spec(spec, device="cpu").eval()
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return indexer


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """(traces of a tiny DeepSeek-V4, its sharded checkpoint, the model)."""
    root = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=64, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        head_dim=32, q_lora_rank=24, num_experts_per_tok=2, n_routed_experts=4, o_groups=2, o_lora_rank=16,
        index_n_heads=16, index_head_dim=32, index_topk=16, sliding_window=16, initializer_range=0.3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "compressed_sparse_attention"],
        num_hash_layers=1, max_position_embeddings=4096, qk_rope_head_dim=16,
    )  # fmt: skip
    model = DeepseekV4ForCausalLM(config).eval()
    model.save_pretrained(root / "checkpoint", max_shard_size="40KB")
    backbone = DeepseekV4Backbone(model)
    trace = TraceConfig(
        chunking=Chunking(tokens=4, sink=0, recent=2), layers=[0, 1], oracle="attention", window=8, text_rows=16
    )
    store = TraceStore.create(root / "traces", Manifest(backbone=backbone.info, trace=trace, documents={}, versions={}))
    generator = torch.Generator().manual_seed(1)
    for index in range(2):
        tokens = torch.randint(2, 64, (400,), generator=generator).tolist()
        raw = backbone.trace(tokens, torch.arange(360, 400), trace)
        span = Span(first=0, last=40, serve=0, tail=False)
        store.write(index, DocumentMeta(name=f"d{index}", task="text", length=400, spans=[span]), raw)
    return store, root / "checkpoint", model


@pytest.mark.parametrize("name", ["hadamard", "plain"])
def test_the_reference_meets_the_parity_vectors(name):
    golden = load_file(GOLDEN)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=16, distance_bumps=0, scale=False, slot=False),
        layers=[0],
        hidden=32,
        key_width=128,
        chunking=Chunking(tokens=4),
        window=64,
        backbone="golden",
        key="fp8_rope_hadamard" if name == "hadamard" else "mean_pre_rope",
        rope=Rope(dims=64, theta=160000, positions=1 << 20, factor=16),
    )
    weights = {key: golden[key].double().numpy() for key in ("wq_a.weight", "wq_b.weight", "weights_proj.weight")}
    weights["q_norm.weight"] = golden["q_norm_weight"].double().numpy()
    logits = layer_logits(spec, weights, golden["hidden"], golden[f"{name}.rows"], golden["positions"])
    torch.testing.assert_close(torch.from_numpy(logits), golden[f"{name}.logits"], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "shape",
    [{}, {"distance_bumps": 0, "join": "max", "bias": True}, {"scale": False, "join": "mean"}, {"slot": False}],
)
def test_indexers_of_both_backbones_pass(stores, native, shape):
    for store in (stores[1], native[0]):
        indexer = new_indexer(store, **shape)
        verdict = verify_indexer(indexer, store)
        assert verdict.failures == []
        assert len(verdict.rows) == 3 * len(store.paths())
        assert all(row.error < 1e-5 and set(row.overlap.values()) == {1.0} for row in verdict.rows)


@pytest.mark.parametrize("broken", ["hadamard", "rope", "key_vectors", "join_layers"])
def test_a_wrong_score_fails(native, monkeypatch, broken):
    store, _, _ = native
    indexer = new_indexer(store)
    if broken == "rope":
        monkeypatch.setattr(Rope, "rotate", lambda rope, x, positions: x)
    else:
        wrong = {"hadamard": lambda x: x, "key_vectors": lambda x: x[..., :-4].view(torch.float8_e4m3fn).float(),
                 "join_layers": lambda logits, join: logits.amax(0)}[broken]  # fmt: skip
        monkeypatch.setattr(indexer_train.model, broken, wrong)
    assert verify_indexer(indexer, store).failures


def test_native_logits_are_recomputed(native):
    store, checkpoint, _ = native
    for source in (checkpoint, None):
        verdict = verify_native(store, source)
        assert verdict.failures == []
        assert len(verdict.rows) == 2 * 2 * 3
        assert all(row.pearson > 0.99 and row.chunks >= 90 for row in verdict.rows)
    exact = verify_native(store, checkpoint).rows[0]
    assert 0 < exact.error < 0.1  # keys are fp8 and hidden states bf16 by now, logits are not


def test_another_checkpoint_fails(native, tmp_path):
    store, _, model = native
    other = DeepseekV4ForCausalLM(model.config)
    other.save_pretrained(tmp_path)
    verdict = verify_native(store, tmp_path)
    assert any("Pearson" in line for line in verdict.failures) and any("top-10" in line for line in verdict.failures)


def test_an_indexer_started_from_the_backbone_scores_like_it(native):
    store, checkpoint, _ = native
    indexer = new_indexer(store, heads=16, rank=24, distance_bumps=0, scale=False, slot=False)
    initialise(indexer, checkpoint)
    document = next(iter(store))
    hidden = torch.stack([document.hidden(layer)[:3].float() for layer in (0, 1)], dim=1)
    keys = torch.stack([document.keys(layer) for layer in (0, 1)], dim=1)
    queries = indexer.query_encoder({"input_features": hidden, "positions": document.positions[:3]})
    chunks = indexer[0].sub_modules["document"][0]({"input_values": keys})
    logits = indexer.layer_logits(queries["sentence_embedding"], chunks["sentence_embedding"]).detach()
    for layer in (0, 1):
        for row, stored in document.native(layer).items():
            both = torch.stack([logits[layer, row, : len(stored.logits)], stored.logits.float()])
            assert torch.corrcoef(both)[0, 1] > 0.99
    assert reference_scores(indexer, hidden, keys, document.positions[:3]).shape == (3, 100)


def dumped(root, queries=True, tamper=False, keys_kept=200):
    """A store of the release's dumps: fp8 queries whose scales the server folded into bf16 head weights."""
    generator = torch.Generator().manual_seed(3)
    keys = encode_keys(torch.randn(200, 128, generator=generator))
    query, weights = torch.randn(64, 128, generator=generator) * 5, torch.randn(64, generator=generator)
    codes = encode_keys(query)  # the same rule: largest magnitude / 448
    values = codes[:, :128].view(torch.float8_e4m3fn).double()
    fused = weights.double() * codes[:, 128:].contiguous().view(torch.float32).double().flatten()
    vectors = keys[:, :128].view(torch.float8_e4m3fn).double() * keys[:, 128:].contiguous().view(torch.float32)
    logits = (torch.relu(values @ vectors.T) * fused[:, None]).sum(0)
    logits = logits.flip(0) if tamper else logits
    native = NativeRow(logits.bfloat16())
    if queries:
        native = NativeRow(logits.bfloat16(), query.bfloat16(), fused.bfloat16())
    trace = TraceConfig(chunking=Chunking(tokens=4), layers=[10], oracle="indexer", window=4, text_rows=4, tail=4)
    store = TraceStore.create(root, Manifest(backbone=V4_FLASH, trace=trace, documents={}, versions={}))
    raw = RawTrace(
        hidden={10: torch.zeros(4, 4096).bfloat16()},
        keys={10: keys[:keys_kept]},
        positions=torch.arange(799, 803),
        oracle=GoldenChunks.from_votes(torch.zeros(4, 200, dtype=torch.int64), 3),
        native={(10, 0): native},
    )
    span = Span(first=0, last=4, serve=0, tail=False)
    store.write(0, DocumentMeta(name="doc_00000", task="chat", length=803, spans=[span]), raw)
    return store


def test_dumps_of_the_release(tmp_path):
    prompt_only = verify_native(dumped(tmp_path / "prompt", keys_kept=150), None)
    assert prompt_only.failures == [] and prompt_only.rows[0].chunks == 150
    verdict = verify_native(dumped(tmp_path / "good"), None)
    assert verdict.failures == []
    assert verdict.rows[0].pearson > 0.999 and verdict.rows[0].overlap[10] >= 0.9
    assert verify_native(dumped(tmp_path / "bad", tamper=True), None).failures
    with pytest.raises(InputError, match="pass --native"):
        verify_native(dumped(tmp_path / "bare", queries=False), None)


def test_the_command_line_and_its_exit_code(native, stores, tmp_path):
    store, checkpoint, _ = native
    export_bundle(new_indexer(store), tmp_path / "bundle")
    run = CliRunner().invoke
    command = ["verify", "--traces", str(store.root)]
    good = run(app, [*command, "--native", str(checkpoint), "--indexer", str(tmp_path / "bundle")])
    assert good.exit_code == 0 and "verified" in good.output and "indexer, joined" in good.output
    assert run(app, command).exit_code == 0
    bad = run(app, ["verify", "--traces", str(dumped(tmp_path / "bad", tamper=True).root)])
    assert bad.exit_code == 1 and "FAIL native, layer 10" in bad.output
    none = run(app, ["verify", "--traces", str(stores[1].root)])
    assert isinstance(none.exception, InputError) and "no native logits" in str(none.exception)
    other = run(app, ["verify", "--traces", str(stores[1].root), "--indexer", str(tmp_path / "bundle")])
    assert isinstance(other.exception, InputError) and "another backbone" in str(other.exception)
