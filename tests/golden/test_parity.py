"""The committed parity vectors are what their script writes, and the package meets them step by step."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import decode_keys, encode_keys, hadamard
from data_gen.core.rope import Rope
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.scoring import above, select

GOLDEN = Path(__file__).parent / "parity.safetensors"
V4 = Rope(dims=64, theta=160000, positions=1 << 20, factor=16)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def golden_indexer(golden, key, **shape):
    heads, rank, hidden = len(golden["weights_proj.weight"]), *golden["wq_a.weight"].shape
    plain = {"distance_bumps": 0, "scale": False, "slot": False, "join": "max"}
    spec = IndexerSpec(
        shape=IndexerConfig(heads=heads, rank=rank, **(plain | shape)),
        layers=[10],
        hidden=hidden,
        key_width=golden["keys"].shape[1],
        chunking=Chunking(tokens=4),
        window=64,
        backbone="golden",
        key=key,
        rope=V4,
    )
    indexer = MemoryIndexer.from_spec(spec, device="cpu").eval()
    encoder = indexer.query_encoder.encoders["10"]
    with torch.no_grad():
        encoder.wq_a.weight.copy_(golden["wq_a.weight"])
        encoder.q_norm.weight.copy_(golden["q_norm_weight"])
        encoder.wq_b.weight.copy_(golden["wq_b.weight"])
        encoder.weights_proj.weight.copy_(golden["weights_proj.weight"])
    return indexer


@pytest.fixture(params=["hadamard", "plain"])
def case(request, golden):
    """(indexer, stored keys [K, 1, ...], expected tensors of the case)."""
    name = request.param
    expected = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
    if name == "hadamard":
        return golden_indexer(golden, "fp8_rope_hadamard"), expected["rows"][:, None], expected
    return golden_indexer(golden, "mean_pre_rope"), decode_keys(expected["rows"])[:, None], expected


def close(ours, expected):
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)


def test_the_script_writes_the_committed_file(golden, tmp_path):
    script = GOLDEN.parent / "make_parity.py"
    assert "indexer_train" not in script.read_text() and "data_gen" not in script.read_text()
    subprocess.run([sys.executable, script, tmp_path / "again.safetensors"], check=True)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == golden.keys()
    for name, value in golden.items():
        if value.dtype == torch.float64:
            torch.testing.assert_close(again[name], value, atol=1e-9, rtol=1e-9)
        elif name.endswith(".keys"):
            torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(again[name], value), name


def test_rope_hadamard_and_codec(golden):
    assert torch.equal(V4.frequencies(), golden["frequencies"])
    turned = V4.rotate(golden["keys"], 4 * golden["chunks"])
    torch.testing.assert_close(turned, golden["plain.keys"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(hadamard(turned), golden["hadamard.keys"], atol=1e-5, rtol=1e-6)
    for name in ("plain", "hadamard"):
        assert torch.equal(encode_keys(golden[f"{name}.keys"]), golden[f"{name}.rows"])


def test_scores_of_serving_encoding_and_training(golden, case):
    indexer, keys, expected = case
    hidden, positions = golden["hidden"][:, None], golden["positions"]
    serving = indexer.joined_scores(hidden, keys, positions)
    close(serving, expected["logits"])
    queries = indexer.encode_query(list(zip(hidden, positions.tolist(), strict=True)))
    chunks = indexer.encode_document([(key,) for key in keys])
    close(indexer.similarity(queries, chunks), expected["logits"])
    query = {"query_input_features": hidden, "query_positions": positions}  # as the collator names them
    query = {name.removeprefix("query_"): value for name, value in query.items()}
    trained = indexer(query | {"task": "query"}, task="query")["sentence_embedding"]
    stored = indexer({"input_values": keys}, task="document")["sentence_embedding"]
    close(indexer.layer_logits(trained, stored)[0].detach(), expected["logits"])


def test_scores_of_sampled_candidates(golden, case):
    """What the paper's recipe trains with: each query against chunks of its own, in any order, repeats included."""
    indexer, keys, expected = case
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(0, len(keys), (len(golden["positions"]), 50), generator=generator)
    features = {"input_features": golden["hidden"][:, None], "positions": golden["positions"]}
    queries = indexer.query_encoder(features)["sentence_embedding"]
    stored = indexer({"input_values": keys}, task="document")["sentence_embedding"]
    logits = indexer.layer_logits(queries, stored, chunks=golden["chunks"], candidates=candidates)[0]
    close(logits.detach(), expected["logits"].gather(1, candidates))


def test_packed_queries(golden, case):
    indexer, _, expected = case
    features = {"input_features": golden["hidden"][:, None], "positions": golden["positions"]}
    packed = indexer.query_encoder(features)["sentence_embedding"].detach()
    query, weights, position = packed.split([16 * 128, 16, 1], dim=1)
    torch.testing.assert_close(query.reshape(-1, 16, 128).double(), expected["queries"], atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.double(), golden["expected.weights"], atol=1e-5, rtol=0)
    assert torch.equal(position[:, 0].long(), golden["positions"])


def test_selected_sets(golden, case):
    indexer, keys, expected = case
    scores = indexer.joined_scores(golden["hidden"][:, None], keys, golden["positions"])
    visible = golden["visible"].bool()
    top = expected["top"]
    chosen = select(scores, visible, torch.full((len(top),), top.shape[1]))
    for row, best in enumerate(top):
        assert golden["chunks"][chosen[row]].tolist() == sorted(best[best >= 0].tolist())
    assert torch.equal(above(scores, visible, 0.0), expected["above"].bool())


def test_a_bias_shifts_every_logit(golden, case):
    plain, keys, _ = case
    biased = golden_indexer(golden, plain.spec.key, bias=True)
    arguments = (golden["hidden"][:, None], keys, golden["positions"])
    torch.testing.assert_close(biased.joined_scores(*arguments), plain.joined_scores(*arguments))
    with torch.no_grad():
        biased.query_encoder.bias.fill_(5.5)
    torch.testing.assert_close(biased.joined_scores(*arguments), plain.joined_scores(*arguments) + 5.5)


def test_positions_beyond_the_maximum_raise(golden, case):
    indexer, keys, _ = case
    for position in (1 << 20, -1):
        with pytest.raises(InputError, match=r"outside 0\.\.1048575"):
            indexer.joined_scores(golden["hidden"][:1, None], keys, torch.tensor([position]))
