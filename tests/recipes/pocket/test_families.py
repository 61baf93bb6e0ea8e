"""Every pocket model that the command offers: what it runs is the stock model, and its card says what its files say."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.pocket.card import write_card
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import accuracy, batches, documents_of, greedy, weights_digest
from recipes.pocket.tasks import solved
from recipes.pockets import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family, request):
    return request.config.rootpath / "recipes" / family.name / "model"


@torch.no_grad()
def test_it_runs_as_the_stock_model(family, folder):
    ours = family.load(folder).eval()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert type(stock) is family.causal_lm and next(family.indexers(ours))
    length = 2 * stock.config.index_topk * family.entry_tokens(stock.config)
    for model in (ours, stock):
        family.set_topk(model, stock.config.index_topk // 2)  # fewer than there are: the indexers' picks count
    tokens = torch.randint(stock.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(family.logits(ours, tokens), stock(tokens, use_cache=False).logits, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_answers_are_counted_as_the_stock_model_generates_them(family, folder):
    """Where several values are due, and one that is said again is wrong."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ours, tokenizer = family.load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    documents = documents_of(load_config(folder.with_name("config.yaml")), "multi_value", 256, 2)
    ((_, tokens, _),) = batches(tokenizer, documents, 2)
    count = len(documents[0].answer.split())
    made = stock.generate(tokens[:, :-count], max_new_tokens=count, min_new_tokens=count, do_sample=False)
    assert torch.equal(greedy(family, ours, tokens, count), made[:, -count:])
    right = [solved(*pair) for pair in zip(documents, tokenizer.batch_decode(made[:, -count:]), strict=True)]
    assert accuracy(family, ours, tokenizer, documents, 1) == sum(right) / len(right)


def test_its_card_and_its_recipe_are_what_the_files_say(family, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "README.md").unlink()
    write_card(family, tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()
    recorded = json.loads((folder / "training.json").read_text())["config"]
    assert recorded == load_config(folder.with_name("config.yaml")).model_dump(mode="json")
    assert json.loads((folder / "evaluation.json").read_text())["weights"] == weights_digest(folder)
