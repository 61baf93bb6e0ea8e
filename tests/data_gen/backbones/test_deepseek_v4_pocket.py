"""The DeepSeek-V4 tracer on trained weights, against the stock model run in one shot, without cache or pieces."""

import numpy as np
import pytest
import torch

from data_gen.backbones.deepseek_v4_hooks import csa_layers
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import decode_keys
from data_gen.core.keys import key_vectors
from data_gen.core.tensors import lightning_scores
from data_gen.traces.labels import SparseOracle
from tests.data_gen.traces.spread import spread

LENGTH, WIDTH, TOP = 1500, 128, 64
LAYERS = (0, 1, 2)
ROWS = torch.arange(240, LENGTH)  # from here on not every chunk fits in the top-k
NEAR = 1e-5
"""Scores closer than this share of a row's largest: whole and in pieces, fp32 may order them either way."""


@pytest.fixture(scope="module")
def document(pocket):
    return pocket.documents("multi_key", LENGTH, 1)[0]


@pytest.fixture(scope="module")
def ids(pocket, document):
    return pocket.tokens(document)


@pytest.fixture(scope="module")
def stock(pocket, ids):
    """What each CSA layer's modules took and gave, [S, ...], and the eager attention weights of every layer."""
    model = pocket.backbone.model
    seen = {name: {} for name in ("query", "keys", "weights", "scores", "picks", "hidden")}
    hooks = []
    for ordinal, layer in enumerate(csa_layers(model)):
        block = model.get_decoder().layers[layer]
        indexer = block.self_attn.compressor.indexer

        def scored(_, args, output, ordinal=ordinal):
            seen["query"][ordinal], seen["keys"][ordinal], seen["scores"][ordinal] = args[0][0], args[1][0], output[0]

        def record(name, ordinal=ordinal):
            return lambda _, __, output: seen[name].update({ordinal: output[0]})

        hooks.append(indexer.scorer.register_forward_hook(scored))
        hooks.append(indexer.scorer.weights_proj.register_forward_hook(record("weights")))
        hooks.append(indexer.register_forward_hook(record("picks")))
        hooks.append(block.input_layernorm.register_forward_hook(record("hidden")))
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen | {"attentions": output.attentions, "logits": output.logits[0]}


@pytest.fixture(scope="module")
def exact(stock):
    """Every layer's indexer logits [S, N] in float64, by the paper's sum; -inf where a chunk is not complete yet."""
    found = {}
    for layer in LAYERS:
        query, keys, weights = (stock[name][layer].double().numpy() for name in ("query", "keys", "weights"))
        scores = np.zeros((LENGTH, len(keys)))
        for head in range(query.shape[1]):
            scores += weights[:, head, None] * np.maximum(query[:, head] @ keys.T, 0)
        scores *= (query.shape[1] * WIDTH) ** -0.5
        complete = (np.arange(LENGTH)[:, None] + 1) // 4
        found[layer] = np.where(np.arange(len(keys)) < complete, scores, -np.inf)
    return found


@pytest.fixture(scope="module")
def traces(pocket, ids):
    """Traces of either oracle; two of the three layers make a chunk golden."""

    def trace(oracle):
        config = TraceConfig(
            chunking=Chunking(tokens=4, sink=0, recent=1), layers=list(LAYERS), oracle=oracle, votes=2, top_chunks=192
        )
        return pocket.backbone.trace(ids, ROWS, config)

    return {oracle: trace(oracle) for oracle in ("indexer", "attention")}


def ranked(scores):
    """(order, sorted scores) of one row's finite scores, best first."""
    order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
    return order, scores[order]


def test_the_model_answers(pocket, document, stock):
    """The weights are the trained ones, and reading this document took far history."""
    assert pocket.tokenizer.decode(stock["logits"][-2].argmax()) == document.answer


def test_recomputed_top_k_is_the_modules_own(stock, exact, traces):
    """Sets differ by ties at the cut alone, and the tracer, whose own check raises otherwise, found no more of them."""
    ties = 0
    for layer in LAYERS:
        for position in ROWS.tolist():
            order, values = ranked(exact[layer][position])
            picks = stock["picks"][layer][position]
            differ = set(order[:TOP].tolist()) ^ set(picks[picks >= 0].tolist())
            near = NEAR * np.abs(values).max()
            assert all(abs(exact[layer][position, chunk] - values[TOP - 1]) <= near for chunk in differ)
            ties += bool(differ)
    assert ties < 10
    assert all(trace.near_ties < 10 for trace in traces.values())


def golden(exact, position, least):
    """({chunk: votes}, whether rounding may change them) by the release's rule: top-k, softmax, 60 % and one more."""
    votes, near = {}, False
    for scores in exact.values():
        order, values = ranked(scores[position])
        weights = np.exp(values[:TOP] - values[0])
        cumulated = np.cumsum(weights) / weights.sum()
        taken = max(1, int((cumulated <= 0.6).sum())) + 1
        gap = NEAR * np.abs(values).max()
        near |= np.abs(cumulated - 0.6).min() < NEAR
        near |= any(cut < len(values) and values[cut - 1] - values[cut] < gap for cut in (taken, TOP))
        for chunk in order[:taken].tolist():
            votes[chunk] = votes.get(chunk, 0) + 1
    return {chunk: count for chunk, count in votes.items() if count >= least}, near


def test_votes_are_the_releases_in_float64(exact, traces):
    found, near_rows = traces["indexer"].oracle, 0
    for row, position in enumerate(ROWS.tolist()):
        part = slice(*found.pointers[row : row + 2].tolist())
        expected, near = golden(exact, position, least=2)
        near_rows += near
        if not near:
            assert dict(zip(found.chunks[part].tolist(), found.votes[part].tolist(), strict=True)) == expected
    assert near_rows < 0.1 * len(ROWS)
    assert set(found.votes.tolist()) == {2, 3}


def test_attention_is_the_stock_models_eager_weights(pocket, stock, traces):
    oracle = traces["attention"].oracle
    mean, peak = spread(SparseOracle.of(oracle, LENGTH // 4))
    layers = [stock["attentions"][layer][0][..., LENGTH:] for layer in csa_layers(pocket.backbone.model)]
    weights = torch.stack(layers)[:, :, ROWS]  # [layers, heads, R, N]: a softmax over window, chunks and sink
    torch.testing.assert_close(mean, weights.mean(dim=(0, 1)), atol=2e-4, rtol=2e-3)  # stored in fp16
    torch.testing.assert_close(peak, weights.amax(dim=1).mean(dim=0), atol=2e-4, rtol=2e-3)
    assert torch.all(mean.sum(dim=1) < 1) and oracle.rest.max() < 1e-6


def test_attention_finds_the_fact(pocket, ids, document, traces):
    """At the question's end most is read where the fact left the sliding window: the entry has all of it by then."""
    fact = ids.index(pocket.tokenizer.convert_tokens_to_ids(document.answer))  # "note KEY VALUE ."
    window = pocket.backbone.model.config.sliding_window
    assert ids[fact - 1] == ids[-3] and fact + 2 * window < LENGTH
    mean, _ = spread(SparseOracle.of(traces["attention"].oracle, LENGTH // 4))
    assert fact // 4 <= int(mean[-2].argmax()) <= (fact + window) // 4 + 1


def test_keys_are_the_codec_of_the_compressed_indexer_keys(stock, traces):
    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for j in range(WIDTH)] for i in range(WIDTH)]) / WIDTH**0.5
    for layer in LAYERS:
        stored = traces["indexer"].keys[layer]
        assert stored.shape == (LENGTH // 4, WIDTH + 4) and stored.dtype == torch.uint8
        rotated = stock["keys"][layer].double().numpy() @ hadamard
        scale = np.abs(rotated).max(axis=1, keepdims=True) / 448
        torch.testing.assert_close(
            stored[:, WIDTH:].contiguous().view(torch.float32), torch.from_numpy(scale).float(), atol=0, rtol=1e-4
        )
        codes = torch.from_numpy(rotated / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        assert (codes == stored[:, :WIDTH]).float().mean() > 0.999  # a value at the edge of a step may fall either way
        step = np.abs(rotated).max(axis=1, keepdims=True) / 16  # fp8: three mantissa bits
        assert np.all(np.abs(decode_keys(stored).numpy() - rotated) <= step)


def test_states_and_native_rows(stock, exact, traces):
    raw = traces["indexer"]
    assert torch.equal(raw.positions, ROWS)
    assert set(raw.native) == {(layer, row) for layer in LAYERS for row in range(3)}
    for layer in LAYERS:
        torch.testing.assert_close(raw.hidden[layer].float(), stock["hidden"][layer][ROWS], atol=1e-2, rtol=1e-2)
        for row in range(3):
            native, position = raw.native[layer, row], int(ROWS[row])
            expected = torch.from_numpy(exact[layer][position, : (position + 1) // 4])
            torch.testing.assert_close(native.logits.double(), expected, atol=1e-4, rtol=1e-4)
            keys = key_vectors(raw.keys[layer])[: len(expected)]
            again = lightning_scores(native.query[None], native.weights[None], keys)[0]
            assert np.corrcoef(again, expected)[0, 1] > 0.999


def test_our_rope_turns_queries_like_the_model(pocket, stock):
    model = pocket.backbone.model
    for ordinal, layer in enumerate(csa_layers(model)):
        attention = model.get_decoder().layers[layer].self_attn
        with torch.no_grad():
            residual = attention.q_a_norm(attention.q_a_proj(stock["hidden"][ordinal]))
            query = attention.compressor.indexer.q_b_proj(residual).unflatten(-1, (-1, WIDTH))
        turned = pocket.backbone.info.rope.rotate(query, torch.arange(LENGTH)[:, None])
        torch.testing.assert_close(turned, stock["query"][ordinal], atol=1e-4, rtol=1e-4)
