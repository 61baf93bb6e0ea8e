"""The host gives the indexer what a trace holds, and a whole decode under an indexer equals the masked stock model."""

import pytest
import torch
from transformers import DynamicCache

from data_gen.backbones.deepseek_v4 import DeepseekV4Backbone
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.runtime.hosts.deepseek_v4 import DeepseekV4Host, ResidentCsaCache
from eval.runtime.runtime import LSARuntime
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Budget
from tests.conftest import tiny_model
from tests.eval.runtime.hosts.masked_v4 import masked

IDS = torch.randint(0, 128, (2, 130), generator=torch.Generator().manual_seed(8))
CHUNKING = Chunking(tokens=4, sink=1, recent=2)
LAYERS = [1, 3]
TAU = 16


@pytest.fixture(scope="module")
def model():
    return tiny_model("deepseek_v4")


@pytest.fixture(scope="module")
def indexer(model):
    info = DeepseekV4Backbone(model).info
    spec = IndexerSpec(
        shape=IndexerConfig(heads=16, rank=8), layers=LAYERS, hidden=32, key_width=16, chunking=CHUNKING, window=TAU,
        backbone=info.fingerprint, key=info.key, rope=info.rope,
    )  # fmt: skip
    torch.manual_seed(3)
    return MemoryIndexer.from_spec(spec, device="cpu").eval()


@torch.no_grad()
def test_what_the_indexer_reads_is_what_a_trace_holds(pocket):
    """On trained weights."""
    model, layers = pocket.backbone.model, [0, 2]
    ids = torch.tensor([pocket.tokens(document)[:180] for document in pocket.documents("multi_key", 300, 2)])
    host = DeepseekV4Host(model, layers)
    with host.attached():
        model(ids[:, :150], past_key_values=host.cache)
        host.keep([torch.tensor([0, 4, 9]), torch.tensor([1, 2])])  # keys are of all chunks all the same
        for token in range(150, 180):
            if token == 167:
                host.keys()  # what is encoded once is not encoded again
            model(ids[:, token : token + 1], past_key_values=host.cache)
    assert host.position == 179 and host.hidden().shape == (2, 2, 192) and host.keys().shape == (2, 45, 2, 132)
    chunking = Chunking(tokens=4, sink=0, recent=1)
    settings = TraceConfig(chunking=chunking, layers=layers, oracle="indexer", votes=2, window=8, tail=4, text_rows=32)
    for sequence in range(2):
        raw = pocket.backbone.trace(ids[sequence, :150].tolist(), torch.tensor([149]), settings)
        for at, layer in enumerate(layers):
            assert (host.keys()[sequence, :37, at] == raw.keys[layer]).float().mean() > 0.99  # batch 2 beside batch 1
    single = DeepseekV4Host(model, layers)
    with single.attached():
        model(ids[:1, :150], past_key_values=single.cache)
    raw = pocket.backbone.trace(ids[0, :150].tolist(), torch.tensor([149]), settings)
    for at, layer in enumerate(layers):
        assert torch.equal(single.keys()[0, :, at], raw.keys[layer])
        assert torch.equal(single.hidden()[:, at], raw.hidden[layer])


def choose(indexer, host):
    """The resident set of each sequence: the protected chunks and a fifth of the others, by the indexer's score."""
    sets = []
    first, last = CHUNKING.candidates(host.position)
    for hidden, keys in zip(host.hidden(), host.keys(), strict=True):
        scores = indexer.joined_scores(hidden[None], keys, torch.tensor([host.position]))[0]
        resident = torch.ones(len(scores), dtype=torch.bool)
        resident[first:last] = False
        resident[first + scores[first:last].topk((last - first) // 5).indices] = True
        sets.append(resident.nonzero().flatten())
    return sets


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_under_an_indexer_is_the_masked_stock_model(model, indexer, batch):
    host, stock = DeepseekV4Host(model, LAYERS), DynamicCache(config=model.config)
    with host.attached():
        logits = model(IDS[:batch, :120], past_key_values=host.cache).logits[:, -1:]
    model(IDS[:batch, :120], past_key_values=stock)
    sets_seen = []
    for step in range(4 * TAU):
        if step % TAU == 0:
            total = host.cache.total
            sets = choose(indexer, host)
            before = [set(chunks.tolist()) for chunks in host.cache.resident()]
            move = host.keep(sets)
            after = [set(chunks.tolist()) for chunks in sets]
            assert move.fetched == sum(len(a - b) for a, b in zip(after, before, strict=True))
            assert move.evicted == sum(len(b - a) for a, b in zip(after, before, strict=True))
            evicted = [sorted(set(range(total)) - chunks) for chunks in after]
            sets_seen.append([tuple(sorted(chunks)) for chunks in after])
        token = logits.argmax(-1)
        with host.attached():
            logits = model(token, past_key_values=host.cache).logits
        with masked(model, evicted):
            expected = model(token, past_key_values=stock).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        for chunks, resident in zip(after, host.cache.resident(), strict=True):
            assert set(resident.tolist()) == chunks | set(range(total, host.cache.total))
    assert len({window[0] for window in sets_seen}) == 4  # the set did change
    chunks = sum(map(len, host.cache.resident()))
    used = host.resident_bytes()
    assert used.tensors == chunks * 4 * (32 + 16) * 4  # 4 CSA layers, fp32
    assert used.served == chunks * 4 * (48 + 20)  # 24 fp8, 8 in bf16, a scale: 41, padded to 48; 16 fp8 and a scale
    assert used.keys == batch * host.cache.total * 2 * 20


@torch.no_grad()
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_runtime_is_the_masked_stock_model(model, indexer, batch, lag, monkeypatch):
    runtime, sets = LSARuntime(indexer, model, selection=Budget(budget=0.2), lag=lag), {}

    def watched(step):
        def watching(resident):
            if isinstance(resident, list):
                sets[runtime.host.position] = runtime.host.cache.total, [set(chunks.tolist()) for chunks in resident]
            return step(resident)

        return watching

    for name in ("keep", "prepare"):
        monkeypatch.setattr(runtime.host, name, watched(getattr(runtime.host, name)))
    ids = IDS[:batch, :120]
    found = runtime.generate(
        ids,
        do_sample=False,
        max_new_tokens=4 * TAU,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert list(sets)[:4] == [118 + TAU * window for window in range(4)]
    stock = DynamicCache(config=model.config)
    model(ids[:, :-1], past_key_values=stock)
    for place, logits in enumerate(found.logits, start=119):
        total, resident = sets[118 + max(0, place - 119 - lag) // TAU * TAU]
        with masked(model, [sorted(set(range(total)) - chunks) for chunks in resident]):
            expected = model(found.sequences[:, place : place + 1], past_key_values=stock).logits[:, 0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_reset_and_reorder_reach_all_that_the_host_holds(model):
    host = DeepseekV4Host(model, LAYERS)
    with host.attached():
        model(IDS[:, :50], past_key_values=host.cache)
        hidden, keys = host.hidden(), host.keys()
        host.cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(host.hidden(), hidden[[1, 0]]) and torch.equal(host.keys(), keys[[1, 0]])
        host.cache.reset()
        assert host.position == -1 and host.cache.total == 0
        model(IDS[:, :50], past_key_values=host.cache)
        assert torch.equal(host.hidden(), hidden) and torch.equal(host.keys(), keys)


def test_layers_that_the_model_lacks_are_refused(model):
    with pytest.raises(InputError, match=r"the indexer reads CSA layers \[20\], the model has 4"):
        DeepseekV4Host(model, [1, 20])


def test_beams_follow_their_sequences(model):
    host = DeepseekV4Host(model, LAYERS)
    settings = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False, "attention_mask": torch.ones(1, 60)}
    with host.attached():
        ours = model.generate(IDS[:1, :60], past_key_values=host.cache, **settings)
    assert isinstance(host.cache, ResidentCsaCache)
    assert torch.equal(ours, model.generate(IDS[:1, :60], **settings))
