"""Sessions of a DeepSeek-V4: the cycle, the policies and the decode check run on them as on any model."""

import pytest
import torch

from data_gen.backbones import deepseek_v4 as tracer
from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.backbones.deepseek_v4_hooks import csa_layers
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.traces.labels import SparseOracle
from eval.online.online_policies import indexer_policy, native, recency
from eval.online.session import open_session
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from tests.conftest import tiny_model
from tests.data_gen.traces.spread import spread
from tests.eval.online.courses import followed, keeps, ranked

IDS = torch.randint(0, 128, (200,), generator=torch.Generator().manual_seed(9)).tolist()
CHUNKING = Chunking(tokens=4, sink=1, recent=2)


@pytest.fixture(scope="module")
def model():
    return tiny_model("deepseek_v4")


@pytest.fixture(scope="module")
def indexer(model):
    info = DeepseekV4Backbone(model).info
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=8), layers=[0, 2], hidden=32, key_width=16, chunking=CHUNKING, window=16,
        backbone=info.fingerprint, key=info.key, rope=info.rope,
    )  # fmt: skip
    torch.manual_seed(4)
    return MemoryIndexer.from_spec(spec, device="cpu").eval()


def test_scores_while_decoding_are_those_of_the_trace(pocket, pocket_indexer):
    """On trained weights: the memory indexer's, the backbone's own indexers', and its attention."""
    model, indexer, layers = pocket.backbone.model, pocket_indexer, pocket_indexer.spec.layers
    ids = pocket.tokens(pocket.documents("multi_key", 500, 1)[0])
    read = len(ids) - 2  # up to the answer
    session = open_session(model, indexer.spec)
    session.read(ids[:read])
    chunking = indexer.spec.chunking
    settings = TraceConfig(chunking=chunking, layers=layers, oracle="attention", window=8, tail=4, text_rows=32)
    raw = pocket.backbone.trace(ids[:read], torch.tensor([read - 1]), settings)
    hidden, keys = (torch.stack([found[layer] for layer in layers], dim=1) for found in (raw.hidden, raw.keys))
    expected = indexer.joined_scores(hidden, keys, torch.tensor([read - 1]))[0]
    assert float(expected.max() - expected.median()) > 1  # it has an opinion
    assert list(keeps(indexer, 0.2)) == ["full", "indexer", "native", "recency", "random"]
    scores = {"indexer": indexer_policy(indexer)(session), "native": native(session)}
    torch.testing.assert_close(scores["indexer"], expected, atol=1e-5, rtol=1e-6)
    mass = spread(SparseOracle.of(raw.oracle, read // 4))[0][0]
    assert float(mass.sum()) > 0.1
    torch.testing.assert_close(session.mass(), mass, atol=1e-3, rtol=2e-3)  # stored in fp16
    expected = []
    hooks = [
        model.get_decoder()
        .layers[layer]
        .self_attn.compressor.indexer.scorer.register_forward_hook(
            lambda _, __, output: expected.append(output[0, -1].softmax(dim=-1))
        )
        for layer in csa_layers(model)
    ]
    with torch.no_grad():
        model(torch.tensor([ids[:read]]))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(scores["native"], torch.stack(expected).mean(dim=0), atol=1e-5, rtol=1e-3)
    session.host.keep(session.best(scores["indexer"], 0.2).resident)
    session.read(ids[read : read + 1])
    assert len(native(session)) == (read + 1) // 4  # evicted chunks are scored all the same
    with pytest.raises(ValueError, match="full attention only"):
        session.mass()


def test_the_cycle_keeps_what_the_policy_chose(model, indexer):
    session = open_session(model, indexer.spec)
    session.read(IDS[:120])
    logits, run = followed(session, ranked(0.2, recency=recency), 16, IDS[120:160])["recency"]
    resident = run.session.cache.resident()[0].tolist()
    # At position 151 there were 38 chunks: the sink, 7 (a fifth) recent ones, 2 protected, and 2 made since.
    assert resident == [0, *range(29, 40)]
    assert run.usage.refreshes == 3 and run.session.resident_tokens == 4 * 12
    both = followed(session, {"full": None} | ranked(1.0, recency=recency), 16, IDS[120:160])
    full, everything = both["full"][0], both["recency"][0]
    assert torch.equal(full, everything) and float((full - logits).abs().max()) > 0.1


def test_before_the_first_chunk_there_is_nothing_to_choose(model, indexer):
    session = open_session(model, indexer.spec)
    session.read(IDS[:2])
    for logits, run in followed(session, keeps(indexer, 0.2), 16, IDS[2:9]).values():
        assert run.session.cache.total == 2 and run.session.resident_tokens == 9 and run.usage.kept_share == 1
        expected = model(torch.tensor([IDS[:9]])).logits[0, 2:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_long_prompts_are_read_in_pieces(model, indexer, monkeypatch):
    whole = open_session(model, indexer.spec)
    logits = whole.read(IDS)
    monkeypatch.setattr(tracer, "PIECE_TOKENS_CPU", 48)
    pieces = open_session(model, indexer.spec)
    torch.testing.assert_close(pieces.read(IDS), logits, atol=1e-4, rtol=0)
    assert whole.position == pieces.position == 199
    with pytest.raises(InputError, match="2100 tokens, the backbone's context is 2048"):
        pieces.read(IDS[:100] * 19)
