"""Banded attention and dense experts against the stock eager ones; the indexer's loss and recall against plain sums."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV4ForCausalLM

from recipes.pocket.family import OPEN
from recipes.pocket.reading import read_layer, recall
from recipes.pocket.words import build_lexicon, build_tokenizer
from recipes.pocket_v4.attention import no_mask
from recipes.pocket_v4.indexer import IndexerProbe
from recipes.pocket_v4.model import FAMILY


@pytest.fixture
def pair(tiny):
    """The same random weights under the recipe's implementations and under the stock ones, fp32."""
    ours = FAMILY.build(tiny, build_tokenizer(build_lexicon(tiny.vocabulary)))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("sinks", "position_bias")):  # zero at first: a wrong use would not show
                parameter.normal_()
    stock = DeepseekV4ForCausalLM._from_config(
        deepcopy(ours.config), attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    stock.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation != stock.config._attn_implementation
    return ours.eval(), stock.eval()


def run(model, tokens):
    mask = no_mask(*tokens.shape, tokens.device) if model.config._attn_implementation == "pocket" else None
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def draw(model, length, batch=2):
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("topk", [0, 4, OPEN])
@pytest.mark.parametrize("length", [3, 8, 21, 40, 75])
def test_logits_equal_the_stock_model(pair, length, topk):
    for model in pair:
        FAMILY.set_topk(model, topk)
    tokens = draw(pair[0], length)
    with torch.no_grad():
        ours, stock = (run(model, tokens) for model in pair)
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=2e-4)


def test_far_history_matters_in_the_comparison(pair):
    FAMILY.set_topk(pair[0], OPEN)
    tokens = draw(pair[0], 75)
    with torch.no_grad():
        whole = run(pair[0], tokens)
        FAMILY.set_topk(pair[0], 0)
        assert (whole - run(pair[0], tokens))[:, -1].abs().max() > 0.05


@pytest.mark.parametrize("length", [21, 64])
def test_gradients_equal_the_stock_model(pair, length):
    tokens = draw(pair[0], length)
    for model in pair:
        FAMILY.set_topk(model, OPEN)
        logits = run(model, tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    compared = 0
    for (name, ours), stock in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert (ours.grad is None) == (stock.grad is None), name
        if ours.grad is not None:
            compared += bool(stock.grad.abs().max() > 0)
            torch.testing.assert_close(ours.grad, stock.grad, atol=1e-4, rtol=1e-3, msg=partial("{}: {}".format, name))
    assert compared > 40


def reference(scores, visible, mass, rows):
    """KL of a set of rows, weighted by their mass, in plain sums. scores, mass: [S][T]; visible: entries a row."""
    weight = divergence = 0.0
    for row in rows:
        count = visible[row]
        total = sum(mass[row][:count])
        if count == 0 or total == 0:
            continue
        top = max(scores[row][:count])
        norm = top + math.log(sum(math.exp(s - top) for s in scores[row][:count]))
        for s, m in zip(scores[row][:count], mass[row][:count], strict=True):
            divergence += m * (math.log(m / total) - (s - norm)) if m > 0 else 0.0
        weight += total
    return divergence / max(weight, 1e-9)


def test_kl_and_recall_equal_plain_sums_over_the_stock_attention(pair):
    """The target comes from the stock model's attention weights, which hold every pair of tokens."""
    ours, stock = pair
    length, topk = 75, 3
    tokens = draw(ours, length, batch=1)
    answers = torch.zeros(1, length, dtype=torch.bool)
    answers[0, [30, 50, 51, 74]] = True
    for model in pair:
        FAMILY.set_topk(model, OPEN)
    with torch.no_grad(), IndexerProbe(ours, topk, 0.25, answers) as probe:
        run(ours, tokens)
    seen = {}
    layer = stock.model.layers[1].self_attn
    layer.register_forward_hook(lambda _, __, output: seen.update(weights=output[1]))
    layer.compressor.indexer.scorer.register_forward_hook(lambda _, __, output: seen.update(scores=output))
    with torch.no_grad():
        run(stock, tokens)
    mass = seen["weights"][0, :, :, length:].double().sum(0).tolist()
    scores = seen["scores"][0].double().tolist()
    visible = [(row + 1) // 4 for row in range(length)]
    asked = [30, 50, 51, 74]
    rest = [row for row in range(length) if row not in asked]
    (reading,) = probe.readings
    expected = 0.25 * reference(scores, visible, mass, asked) + 0.75 * reference(scores, visible, mass, rest)
    assert expected > 0.1
    assert float(reading.kl) == pytest.approx(expected, rel=1e-3)
    found = 0.0
    for row in asked:
        best = sorted(range(visible[row]), key=lambda entry, row=row: -scores[row][entry])[:topk]
        found += sum(mass[row][entry] for entry in best)
    everything = sum(sum(mass[row][: visible[row]]) for row in asked)
    assert float(recall(probe.readings)) == pytest.approx(found / everything, rel=1e-3)
    assert 0.05 < found / everything < 0.95


def test_entries_that_were_not_picked_do_not_count():
    scores = torch.tensor([[[2.0, 1.0, 9.0]]])
    mass = torch.tensor([[[0.1, 0.3, 0.6]]])
    picks = torch.tensor([[[0, 1, -1]]])
    reading = read_layer(scores, picks, mass, torch.tensor([[True]]), 1.0, 1)
    target, logits = torch.tensor([0.25, 0.75]), torch.tensor([2.0, 1.0]).log_softmax(-1)
    assert float(reading.kl) == pytest.approx(float((target * (target.log() - logits)).sum()), rel=1e-5)
    assert float(reading.mass) == pytest.approx(0.4)
    assert float(reading.found) == pytest.approx(0.1)


def test_the_kl_trains_the_indexer_and_nothing_else(pair):
    ours = pair[0]
    FAMILY.set_topk(ours, OPEN)
    tokens = draw(ours, 40)
    with IndexerProbe(ours, 4, 0.5, tokens > 20) as probe:
        logits = run(ours, tokens)
    probe.readings[0].kl.backward(retain_graph=True)
    trained = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained and all(".indexer." in name for name in trained)
    ours.zero_grad()
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is None or not p.grad.any() for m in FAMILY.indexers(ours) for p in m.parameters())
