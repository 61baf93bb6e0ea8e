"""`lookahead verify` passes what is right, and finds what was tampered with."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import indexer_train.model
from cli import app
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys
from data_gen.core.keys import KEY_RECIPES
from data_gen.core.rope import Rope
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.store import TraceStore
from data_gen.traces.types import DocumentMeta, GoldenChunks, Manifest, NativeRow, RawTrace, Span
from eval.offline.reference import layer_logits
from eval.offline.verify import verify_indexer, verify_native
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle
from indexer_train.model import IndexerSpec, MemoryIndexer

GOLDEN = Path(__file__).parents[2] / "golden" / "parity.safetensors"


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


def perturbed(store, root, part):
    """A copy of `store` with one layer's keys or hidden states moved on by one row."""
    shutil.copytree(store.root, root)
    for path in store.paths():
        with safe_open(path, framework="pt") as file:
            described = {name: value for name, value in file.metadata().items() if name != "checksum"}
        tensors = load_file(path)
        tensors[f"layers.1.{part}"] = tensors[f"layers.1.{part}"].roll(1, dims=0)
        save_file(tensors, root / path.relative_to(store.root), described)
    return TraceStore.open(root)


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
def test_indexers_of_both_backbones_pass(stores, pocket_traces, shape):
    for store in (stores[1], pocket_traces):
        indexer = new_indexer(store, **shape)
        verdict = verify_indexer(indexer, store)
        assert verdict.failures == []
        assert len(verdict.rows) == 3 * len(store.paths())
        assert all(row.error < 1e-5 and set(row.overlap.values()) == {1.0} for row in verdict.rows)


@pytest.mark.parametrize("broken", ["hadamard", "rope", "key_vectors", "join_layers"])
def test_a_wrong_score_fails(pocket_traces, monkeypatch, broken):
    indexer = new_indexer(pocket_traces)
    if broken == "rope":
        monkeypatch.setattr(Rope, "rotate", lambda rope, x, positions: x)
    elif broken == "hadamard":
        monkeypatch.setitem(KEY_RECIPES, indexer.spec.key, replace(KEY_RECIPES[indexer.spec.key], turn=lambda x: x))
    else:
        wrong = {"key_vectors": lambda x, device: x[..., :-4].view(torch.float8_e4m3fn).float(),
                 "join_layers": lambda logits, join: logits.amax(0)}[broken]  # fmt: skip
        monkeypatch.setattr(indexer_train.model, broken, wrong)
    assert verify_indexer(indexer, pocket_traces).failures


def test_native_logits_are_recomputed(pocket, pocket_traces):
    for source in (pocket.folder, None):
        verdict = verify_native(pocket_traces, source)
        assert verdict.failures == []
        assert len(verdict.rows) == 2 * 3 * 3
        assert all(row.pearson > 0.999 and row.chunks >= 230 for row in verdict.rows)
    exact = verify_native(pocket_traces, pocket.folder).rows[0]
    assert 0 < exact.error < 0.1  # keys are fp8 and hidden states bf16 by now, logits are not


@pytest.mark.parametrize("part", ["keys", "hidden"])
def test_a_perturbed_trace_fails(pocket, pocket_traces, tmp_path, part):
    store = perturbed(pocket_traces, tmp_path / part, part)
    failures = verify_native(store, pocket.folder).failures
    assert failures and all("layer 1" in line or "top-10" in line for line in failures)
    assert bool(verify_native(store, None).failures) == (part == "keys")  # stored queries need no hidden states


def test_another_checkpoint_fails(pocket, pocket_traces, tmp_path):
    """One layer's latent in another order: as large, as sparse, and wrong."""
    tensors = load_file(pocket.folder / "model.safetensors")
    needed = {name: value for name, value in tensors.items() if "indexer" in name or ".attn.wq_a" in name
              or ".attn.q_norm" in name}  # fmt: skip
    swapped = next(name for name in sorted(needed) if name.endswith("indexer.wq_b.weight"))
    save_file(needed | {swapped: needed[swapped].flip(1).contiguous()}, tmp_path / "model.safetensors")
    verdict = verify_native(pocket_traces, tmp_path)
    assert any("Pearson" in line for line in verdict.failures) and any("top-10" in line for line in verdict.failures)


def dumped(root, queries=True, tamper=False, keys_kept=200, change=lambda row: row, first=799):
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
    store = TraceStore.create(
        root, Manifest(backbone=V4_FLASH, trace=trace, documents={}, plan={0: ("doc_00000", "")}, versions={})
    )
    raw = RawTrace(
        hidden={10: torch.zeros(4, 4096).bfloat16()},
        keys={10: keys[:keys_kept]},
        positions=torch.arange(first, first + 4),
        oracle=GoldenChunks.from_votes(torch.zeros(4, 200, dtype=torch.int64), 3),
        native={(10, 0): change(native), (10, 1): copy.deepcopy(native)},
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: replace(row, logits=row.logits[:2]), "2 logits are stored, 200 chunks were visible"),
        (lambda row: replace(row, logits=row.logits[:0]), "0 logits are stored"),
        (lambda row: replace(row, logits=row.logits.repeat(2)), "400 logits are stored"),
        (lambda row: replace(row, logits=row.logits / 0), "NaN or infinity"),
        (lambda row: replace(row, weights=row.weights * torch.nan), "NaN or infinity"),
    ],
)
def test_a_row_that_cannot_be_the_indexers_fails(tmp_path, change, reason):
    verdict = verify_native(dumped(tmp_path, change=change), None)
    assert len(verdict.rows) == 1 and len(verdict.failures) == 1
    assert "native, layer 10, doc_00000, position 799: " in verdict.failures[0] and reason in verdict.failures[0]


def test_rows_that_prove_nothing_are_counted(tmp_path):
    few = dumped(tmp_path / "few", keys_kept=9)
    with pytest.raises(InputError, match=r"no native logits to verify. skipped: 2 native rows with fewer than 10"):
        verify_native(few, None)
    verdict = verify_indexer(new_indexer(few), dumped(tmp_path / "start", first=0))
    assert [row.position for row in verdict.rows] == [3] and verdict.failures == []
    assert verdict.notes == ["skipped: 2 query tokens to which no chunk is visible yet"]


def test_a_trace_that_sees_no_chunk_has_no_score(tmp_path):
    store = dumped(tmp_path)
    trace = store.manifest.trace.model_copy(update={"chunking": Chunking(tokens=1024)})
    unseeing = TraceStore(store.root, store.manifest.model_copy(update={"trace": trace}))
    with pytest.raises(InputError, match=r"no score to verify. skipped: 3 query tokens"):
        verify_indexer(new_indexer(unseeing), unseeing)


def test_the_command_line_and_its_exit_code(pocket, pocket_traces, pocket_indexer, stores, tmp_path):
    export_bundle(pocket_indexer, tmp_path / "bundle")
    run = CliRunner().invoke
    command = ["verify", "--traces", str(pocket_traces.root)]
    few = new_indexer(dumped(tmp_path / "start", first=0))
    few.save_pretrained(str(tmp_path / "few"))
    start = run(app, ["verify", "--traces", str(tmp_path / "start"), "--indexer", str(tmp_path / "few")])
    assert start.exit_code == 0 and "skipped: 2 query tokens" in start.output
    good = run(app, [*command, "--native", str(pocket.folder), "--indexer", str(tmp_path / "bundle")])
    assert good.exit_code == 0 and "verified" in good.output and "indexer, joined" in good.output
    assert run(app, command).exit_code == 0
    bad = run(app, ["verify", "--traces", str(dumped(tmp_path / "bad", tamper=True).root)])
    assert bad.exit_code == 1 and "FAIL native, layer 10" in bad.output
    none = run(app, ["verify", "--traces", str(stores[1].root)])
    assert isinstance(none.exception, InputError) and "no native logits" in str(none.exception)
    other = run(app, ["verify", "--traces", str(stores[1].root), "--indexer", str(tmp_path / "bundle")])
    assert isinstance(other.exception, InputError) and "another backbone" in str(other.exception)
