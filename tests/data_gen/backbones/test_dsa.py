"""DSA traces against the stock model: its eager weights, its indexers' picks, sums written out."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import eager_weights, ids
from benchmarks.tiny_models import tiny
from data_gen.backbones.dsa import DsaBackbone, piece_tokens
from data_gen.backbones.load import adapter
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import decode_keys, encode_keys
from data_gen.traces.labels import SparseOracle
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import documents_of
from tests.data_gen.backbones.stock_indexers import stock_parts, stock_scores
from tests.data_gen.traces.spread import spread

LENGTH, CHUNK = 110, 4
ROWS = torch.tensor([6, 40, 90, 109])


@pytest.fixture(params=["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note"])
def backbone(request):
    return adapter(tiny(request.param))


def settings(backbone, **changes):
    given = {"chunking": Chunking(tokens=CHUNK, sink=1, recent=2), "layers": backbone.info.full_layers[:2], "votes": 1}
    return TraceConfig(**(given | {"window": 8, "tail": 4, "text_rows": 16, "top_chunks": 1000} | changes))


@pytest.fixture
def stock(backbone):
    return stock_parts(backbone.model, ids(0, LENGTH))


def test_it_is_opened_as_what_it_is(backbone):
    assert isinstance(backbone, DsaBackbone)
    assert backbone.info.key_width == backbone.model.config.get_text_config().index_head_dim


def test_keys_are_mean_index_keys_before_rope(backbone, stock):
    raw = backbone.trace(ids(0, LENGTH)[0].tolist(), ROWS, settings(backbone))
    for layer in settings(backbone).layers:
        whole = LENGTH // CHUNK * CHUNK
        expected = stock[layer, "k_norm"][:whole].unflatten(0, (-1, CHUNK)).mean(1)
        torch.testing.assert_close(raw.keys[layer].float(), expected, atol=2e-3, rtol=2e-3)


def test_a_mean_of_keys_is_on_no_fp8_grid():
    """Why a page's key is 256 bytes of fp16 and not 132: those hold the key of one token exactly, of 64 they round."""
    tokens = decode_keys(encode_keys(torch.randn(200, 64, 128, generator=torch.Generator().manual_seed(1))))
    alone, pages = tokens[:, 0], tokens.mean(dim=1)
    assert torch.equal(decode_keys(encode_keys(alone)), alone)

    def error(stored):
        return float((stored - pages).norm() / pages.norm())

    assert error(decode_keys(encode_keys(pages))) > 1e-2
    assert error(pages.half().float()) < 3e-4


def golden_by_hand(backbone, stock, row, chunk, votes):
    """Chunk -> votes at one query token, written out from the stock indexers' parts: tokens by score, softmax over the
    picks, chunks of those in front."""
    counts = torch.zeros((row + 1) // chunk + 1, dtype=torch.int64)
    for layer in backbone.indexers:
        scores = stock_scores(backbone.model, stock, layer, row)
        best = scores.topk(min(backbone.model.config.get_text_config().index_topk, row + 1))
        picks = set(stock[layer, "picks"][row].tolist()) & set(range(row + 1))
        assert set(best.indices.tolist()) == picks
        found, mass = set(), 0.0
        for place, share in enumerate(best.values.softmax(0).tolist()):
            mass += share
            found.add(int(best.indices[place]) // chunk)
            if mass > 0.6 and place:
                break
        counts[sorted(found)] += 1
    return {number: count for number, count in enumerate(counts[:-1].tolist()) if count >= votes}


def golden(oracle, index):
    stored = slice(*oracle.pointers[index : index + 2].tolist())
    return dict(zip(oracle.chunks[stored].tolist(), oracle.votes[stored].tolist(), strict=True))


@pytest.mark.parametrize("votes", [1, 2])
def test_votes_are_the_picks_that_hold_the_scores_mass(backbone, stock, votes):
    raw = backbone.trace(ids(0, LENGTH)[0].tolist(), ROWS, settings(backbone, oracle="indexer", votes=votes))
    for index, row in enumerate(ROWS.tolist()):
        assert golden(raw.oracle, index) == golden_by_hand(backbone, stock, row, CHUNK, votes)


def test_votes_of_a_trained_model_for_pages_of_64_tokens(request):
    """Several pieces long, and longer than what its indexers pick."""
    folder = request.config.rootpath / "recipes/pocket_dsa/model"
    backbone = adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    (document,) = documents_of(load_config(folder.with_name("config.yaml")), "tracking", 1024, 1)
    text = f"{document.prompt} {document.answer}"
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    rows = torch.tensor([200, 511, 512, 900, 1021, 1022])  # the last two predict the answer
    pages = Chunking(tokens=64, sink=0, recent=1)
    raw = backbone.trace(tokens[0].tolist(), rows, settings(backbone, oracle="indexer", chunking=pages, votes=2))
    stock = stock_parts(backbone.model, tokens)
    truth = [golden_by_hand(backbone, stock, row, 64, 2) for row in rows.tolist()]
    assert [golden(raw.oracle, index) for index in range(len(rows))] == truth
    assert 0 < sum(map(len, truth)) < sum((row + 1) // 64 for row in rows.tolist())


def test_pieces_are_one_reading(backbone, monkeypatch):
    tokens = ids(0, LENGTH)[0].tolist()
    whole = backbone.trace(tokens, ROWS, settings(backbone))
    monkeypatch.setattr("data_gen.backbones.dsa.PIECE_TOKENS", 17)
    assert piece_tokens(backbone.model, 50) == 17
    pieces = backbone.trace(tokens, ROWS, settings(backbone))
    mean, other = (spread(SparseOracle.of(raw.oracle, LENGTH // CHUNK))[0] for raw in (whole, pieces))
    torch.testing.assert_close(mean, other, atol=1e-3, rtol=1e-2)
    for layer in whole.keys:
        torch.testing.assert_close(whole.keys[layer], pieces.keys[layer], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(whole.hidden[layer], pieces.hidden[layer], atol=2e-2, rtol=2e-2)


def test_probabilities_are_the_eager_weights(backbone):
    raw = backbone.trace(ids(0, LENGTH)[0].tolist(), ROWS, settings(backbone))
    mean, peak = spread(SparseOracle.of(raw.oracle, LENGTH // CHUNK))
    every = eager_weights(backbone.model, ids(0, LENGTH))
    weights = torch.stack([every[layer] for layer in backbone.info.full_layers])  # [layers, H, S, S]
    for index, row in enumerate(ROWS.tolist()):
        complete = (row + 1) // CHUNK
        pooled = weights[:, :, row, : complete * CHUNK].unflatten(-1, (complete, CHUNK)).sum(-1)
        torch.testing.assert_close(mean[index, :complete], pooled.mean((0, 1)), atol=5e-4, rtol=2e-3)
        torch.testing.assert_close(peak[index, :complete], pooled.amax(1).mean(0), atol=5e-4, rtol=2e-3)


def test_a_wrong_pick_is_found(backbone):
    indexer = next(iter(backbone.indexers.values()))
    hook = indexer.register_forward_hook(lambda _, __, picks: picks.roll(1, dims=1))
    with pytest.raises(InputError, match="recomputed top-12 differs"):
        backbone.trace(ids(0, LENGTH)[0].tolist(), ROWS, settings(backbone))
    hook.remove()


def test_settings_that_do_not_fit_are_refused(backbone):
    with pytest.raises(InputError, match="not full-attention layers"):
        backbone.check(settings(backbone, layers=[99]))
    count = len(backbone.indexers)
    with pytest.raises(InputError, match=f"{count + 1} layers have to agree, but {count} have an indexer"):
        backbone.check(settings(backbone, oracle="indexer", votes=count + 1))
