"""The per-step correction against the stock model under a mask of its own for every layer and token."""

from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from data_gen.backbones.layers import attention_modules
from data_gen.core.errors import InputError
from eval.runtime.correction import Correction
from eval.runtime.hosts.dense import DenseHost
from eval.runtime.hosts.together import read_together
from tests.conftest import tiny_model

SIZE, PROMPT, END = 4, 90, 116  # 22 chunks, and two tokens of the next
IDS = torch.randint(0, 128, (1, 160), generator=torch.Generator().manual_seed(7))
BOTH = pytest.mark.parametrize("query", ["same", "previous"])


def open_host(model, correction):
    return DenseHost(model, SIZE, sorted(attention_modules(model))[:1], correction=correction)


def base(total):
    """Other sets at every refresh: some chunks stay, some go, some come back."""
    kept = torch.rand(total, generator=torch.Generator().manual_seed(total)) < 0.3
    kept[-2:] = True
    return kept.nonzero().flatten()


class Truth:
    """Stock cache and stock eager attention; chosen: layer -> a set of chunks for every token that was corrected."""

    def __init__(self, model, chunks, query):
        self.model, self.chunks, self.query = model, chunks, query
        self.cache, self.layers = DynamicCache(config=model.config), attention_modules(model)
        self.last, self.chosen, self.kept, self.total = {}, {i: [] for i in self.layers}, None, 0

    def keep(self, chunks, total):
        self.kept, self.total = set(chunks.tolist()), total

    def keep_everything(self):
        self.kept = None
        for sets in self.chosen.values():
            sets.append(set())  # what is resident is not the correction's, and goes again

    @contextmanager
    def _attending(self):
        names = {module: layer for layer, module in self.layers.items()}

        def attention(module, query, key, value, mask, scaling, **options):
            if module in names:
                asks = self.last.get(module, query[:, :, -1:]) if self.query == "previous" else query[:, :, -1:]
                self.last[module] = query[:, :, -1:]
                if self.kept is not None:
                    mask = self.mask(names[module], asks, key, scaling)
            return eager_attention_forward(module, query, key, value, mask, scaling, **options)

        ALL_ATTENTION_FUNCTIONS["eager"] = attention
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS["eager"]

    def mask(self, layer, asks, key, scaling):
        groups = asks.shape[1] // key.shape[1]
        shares = []
        for head in range(asks.shape[1]):
            means = torch.stack(
                [key[0, head // groups, chunk * SIZE : (chunk + 1) * SIZE].mean(0) for chunk in range(self.total)]
            )
            shares.append(torch.softmax(means.half().float() @ asks[0, head, 0] * scaling, dim=0))
        score = torch.stack(shares).max(dim=0).values.tolist()
        absent = sorted(set(range(self.total)) - self.kept, key=lambda chunk: -score[chunk])
        chosen = set(absent[: self.chunks])
        self.chosen[layer].append(chosen)
        seen = torch.ones(key.shape[2], dtype=torch.bool)
        for chunk in set(absent) - chosen:
            seen[chunk * SIZE : (chunk + 1) * SIZE] = False
        return torch.zeros(1, 1, 1, len(seen)).masked_fill(~seen, -torch.inf)

    def read(self, ids):
        with self._attending():
            return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]

    def fetches(self):
        """Chunks that were not there at the token before, by counting; a chunk of the base set is not there for it."""
        return sum(
            len(new - old) for sets in self.chosen.values() for old, new in zip([set(), *sets], sets, strict=False)
        )


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("chunks", [1, 3, 50])
def test_every_token_is_the_masked_stock_model(model, query, chunks):
    model.set_attn_implementation("eager")
    host, truth = open_host(model, Correction(chunks=chunks, query=query)), Truth(model, chunks, query)
    torch.testing.assert_close(host.read(IDS[:, :PROMPT]), truth.read(IDS[:, :PROMPT]), atol=1e-4, rtol=1e-4)
    layers, moved = len(host.cache.full), 0
    unit = 2 * 2 * SIZE * 16 * 4  # keys and values, KV 2, d 16, fp32
    for place in range(PROMPT, END):
        if (place - PROMPT) % 8 == 0:
            total = place // SIZE
            truth.keep(base(total), total)
            moved += host.keep([base(total)]).fetched
        token = IDS[:, place : place + 1]
        torch.testing.assert_close(host.read(token), truth.read(token), atol=1e-4, rtol=1e-4)
        held = [len(sets[-1]) for sets in truth.chosen.values()]
        rows = len(base(total)) * SIZE + place + 1 - total * SIZE
        assert held == [min(chunks, total - len(base(total)))] * layers
        assert host.resident_bytes().tensors == sum(held) * unit + layers * rows * unit // SIZE
        assert host.resident_bytes().means == layers * total * 2 * 16 * 2
    corrector = host.cache.corrector
    assert moved > 0 and corrector.fetched == truth.fetches() > 0
    assert {layer: set(chunks) for layer, (chunks, _) in corrector.held.items()} == {
        layer: sets[-1] for layer, sets in truth.chosen.items()
    }
    if chunks == 3:  # or all layers chose alike, and nothing was shown
        assert len({frozenset(sets[-1]) for sets in truth.chosen.values()}) > 1


@torch.no_grad()
@BOTH
def test_everything_resident_is_bitwise_stock(model, query):
    host, stock = open_host(model, Correction(chunks=3, query=query)), DynamicCache(config=model.config)
    for first, last in ((0, PROMPT), *((place, place + 1) for place in range(PROMPT, 100)), (100, 120)):
        piece = IDS[:, first:last]
        assert torch.equal(host.read(piece), model(piece, past_key_values=stock, logits_to_keep=1).logits[:, -1])
        host.keep([torch.arange(last // SIZE)])
    assert host.cache.corrector.fetched == 0


@torch.no_grad()
@BOTH
def test_a_second_turn_and_a_new_conversation(query):
    """All comes back and is read in full; after a reset nothing of what was there is left."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    host = open_host(model, Correction(chunks=3, query=query))
    for begin in (0, 20):
        truth = Truth(model, 3, query)
        for host_or_truth in (host, truth):
            host_or_truth.read(IDS[:, begin : begin + 60])
        for turn in (60, 90):
            place = begin + turn
            truth.keep(base(turn // SIZE), turn // SIZE)
            host.keep([base(turn // SIZE)])
            for at in range(place, place + 6):
                ours, expected = (each.read(IDS[:, at : at + 1]) for each in (host, truth))
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
            host.keep([torch.arange((turn + 6) // SIZE)])
            truth.keep_everything()
            ours, expected = (each.read(IDS[:, place + 6 : place + 30]) for each in (host, truth))
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert host.cache.corrector.fetched == truth.fetches() > 0
        host.cache.reset()
        assert host.cache.corrector.fetched == 0 and host.resident_bytes().means == 0


@torch.no_grad()
@BOTH
def test_forks_and_those_read_together_do_not_disturb_each_other(query):
    model = tiny_model("llama")

    def begun():
        host = open_host(model, Correction(chunks=3, query=query))
        host.read(IDS[:, :PROMPT])
        host.keep([base(22)])
        host.read(IDS[:, PROMPT : PROMPT + 1])
        return host

    alone = [begun(), begun()]
    first = begun()
    together = [first, first.fork()]
    for place in range(PROMPT + 1, PROMPT + 9):
        tokens = [int(IDS[0, place]), int(IDS[0, place + 30])]
        expected = torch.cat([host.read(torch.tensor([[token]])) for host, token in zip(alone, tokens, strict=True)])
        ours = read_together(model, [host.cache for host in together], tokens, lambda call: None)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(alone, together, strict=True):
        assert one.cache.corrector.fetched == other.cache.corrector.fetched
        assert {i: held[0] for i, held in one.cache.corrector.held.items()} == {
            i: held[0] for i, held in other.cache.corrector.held.items()
        }
    assert alone[0].cache.corrector.fetched != alone[1].cache.corrector.fetched


@torch.no_grad()
def test_several_tokens_are_read_one_by_one_and_several_sequences_refused():
    model = tiny_model("llama")
    hosts = [open_host(model, Correction(chunks=3)) for _ in range(2)]
    for host in hosts:
        host.read(IDS[:, :PROMPT])
        host.keep([base(22)])
    ours = [hosts[0].read(IDS[:, place : place + 1]) for place in range(PROMPT, 96)][-1]
    assert torch.equal(hosts[1].read(IDS[:, PROMPT:96]), ours)
    with hosts[0].attached(), pytest.raises(InputError, match="2 tokens at once"):
        model(IDS[:, 96:98], past_key_values=hosts[0].cache)
    batch = open_host(model, Correction(chunks=3))
    batch.read(IDS.expand(2, -1)[:, :PROMPT])
    with pytest.raises(InputError, match="2 sequences at once: the per-step correction serves one"):
        batch.keep([base(22)] * 2)
