"""Fused attention and picks in batches against the stock model; the indexer's loss and recall against plain sums."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV32ForCausalLM

from recipes.pocket.config import PocketConfig, load_config
from recipes.pocket.family import OPEN
from recipes.pocket.reading import recall
from recipes.pocket.step import losses
from recipes.pocket.words import build_lexicon, build_tokenizer
from recipes.pocket_dsa.indexer import TokenProbe
from recipes.pocket_dsa.model import FAMILY


@pytest.fixture(scope="module")
def recipe(request) -> PocketConfig:
    """The shipped recipe with two narrow layers."""
    folder = request.config.rootpath / "recipes/pocket_dsa"
    settings = load_config(folder / "config.yaml").model_dump()
    settings["model"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "index_head_dim": 32, "index_topk": 6, "initializer_range": 0.3,
    }  # fmt: skip
    settings["vocabulary"] = {"keys": 8, "names": 4, "values": 10, "ordinals": 6}
    return PocketConfig.model_validate(settings)


@pytest.fixture
def pair(recipe):
    """The same random weights as the recipe runs them, and as stock eager attention does, fp32."""
    ours = FAMILY.build(recipe, build_tokenizer(build_lexicon(recipe.vocabulary)))
    stock = DeepseekV32ForCausalLM._from_config(deepcopy(ours.config), attn_implementation="eager", dtype=torch.float32)
    stock.load_state_dict(ours.state_dict())
    return ours.eval(), stock.eval()


def draw(model, length, batch=2):
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("topk", [6, OPEN])
@pytest.mark.parametrize("length", [3, 40, 75])
def test_logits_equal_the_stock_model(pair, length, topk):
    for model in pair:
        FAMILY.set_topk(model, topk)
    tokens = draw(pair[0], length)
    with torch.no_grad():
        torch.testing.assert_close(
            FAMILY.logits(pair[0], tokens), pair[1](tokens, use_cache=False).logits, atol=2e-4, rtol=2e-4
        )


def test_gradients_equal_the_stock_model(pair):
    tokens = draw(pair[0], 40)
    for model, logits in zip(pair, (FAMILY.logits(pair[0], tokens), pair[1](tokens).logits), strict=True):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert all(parameter.grad is None for indexer in FAMILY.indexers(model) for parameter in indexer.parameters())
    compared = 0
    for (name, ours), stock in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        if ".indexer." not in name:
            compared += 1
            torch.testing.assert_close(ours.grad, stock.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert compared > 20


def test_kl_and_recall_equal_plain_sums_over_the_stock_attention(pair):
    """Indexer scores are written out here, mass is the stock model's own attention weights."""
    ours, stock = pair
    length, topk, asked = 75, 3, [30, 50, 74]
    tokens = draw(ours, length, batch=1)
    answers = torch.zeros(1, length, dtype=torch.bool)
    answers[0, asked] = True
    for model in pair:
        FAMILY.set_topk(model, OPEN)
    with torch.no_grad(), TokenProbe(ours, topk, 0.25, answers) as probe:
        FAMILY.logits(ours, tokens)
    seen = {}
    attention = stock.model.layers[1].self_attn
    indexer = attention.indexer
    indexer.register_forward_pre_hook(lambda _, args: seen.update(args=args))
    attention.register_forward_hook(lambda _, __, output: seen.update(weights=output[1]))
    with torch.no_grad():
        stock(tokens, use_cache=False)
        hidden, residual, (cos, sin) = (part for part in seen["args"][:3])

        def turn(states):  # half-split pairs on the first 8 dims, [S, ..., 32]
            first, second, rest = states[..., :4], states[..., 4:8], states[..., 8:]
            c, s = (table[0, :, :4].view(length, *[1] * (states.dim() - 2), 4) for table in (cos, sin))
            return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)

        query = turn((residual[0] @ indexer.wq_b.weight.T).view(length, 16, 32))
        key = turn(
            F.layer_norm(hidden[0] @ indexer.wk.weight.T, (32,), indexer.k_norm.weight, indexer.k_norm.bias, 1e-6)
        )
        weights = hidden[0] @ indexer.weights_proj.weight.T
        scores = (torch.einsum("shd,td->sht", query, key).relu() * weights[..., None]).sum(1) / math.sqrt(16 * 32)
    mass = seen["weights"][0].double().sum(0)
    scores = scores.double()

    def divergence(row):
        share = mass[row, : row + 1] / mass[row, : row + 1].sum()
        return float((share * (share.log() - scores[row, : row + 1].log_softmax(-1))).sum())

    rest = [row for row in range(length) if row not in asked]
    expected = 0.25 * sum(map(divergence, asked)) / 3 + 0.75 * sum(map(divergence, rest)) / len(rest)
    assert expected > 0.05
    assert float(probe.readings[1].kl) == pytest.approx(expected, rel=1e-3)
    found = sum(float(mass[row, scores[row, : row + 1].topk(topk).indices].sum()) for row in asked)
    assert float(recall(probe.readings[1:])) == pytest.approx(found / float(mass[asked].sum()), rel=1e-3)
    assert 0.02 < found / float(mass[asked].sum()) < 0.95


@pytest.mark.parametrize("topk", [6, OPEN])
def test_the_kl_trains_the_indexer_and_nothing_else(pair, topk):
    ours = pair[0]
    FAMILY.set_topk(ours, topk)
    tokens = draw(ours, 40)
    with TokenProbe(ours, 4, 0.5, tokens > 20) as probe:
        FAMILY.logits(ours, tokens)
    sum(reading.kl for reading in probe.readings).backward()
    trained = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained and all(".indexer." in name for name in trained)


def test_picks_among_fewer_tokens_than_the_top_k_do_not_count(pair):
    """The first rows see less than the top-k holds: what fills it up is no pick."""
    ours = pair[0]
    FAMILY.set_topk(ours, 6)
    tokens, answers = draw(ours, 20), torch.zeros(2, 20, dtype=torch.bool)
    answers[:, 2] = True
    with torch.no_grad(), TokenProbe(ours, 6, 1.0, answers) as probe:
        FAMILY.logits(ours, tokens)
    for reading in probe.readings:
        assert float(reading.found / reading.mass) == pytest.approx(1.0, abs=1e-5)
        assert math.isfinite(float(reading.kl))


def test_a_step_learns(pair, recipe):
    """A few steps on one batch: answers and indexers both get better."""
    ours = pair[0].train()
    tokens = draw(ours, 64)
    tasks = torch.where(torch.arange(64) % 8 == 0, 1, -1).expand(2, -1)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, metrics = losses(FAMILY, ours, tokens, tasks, recipe.loss)
        loss.backward()
        optimizer.step()
        seen.append(metrics)
    assert seen[-1][0] < 0.8 * seen[0][0] and seen[-1][2] < seen[0][2]
