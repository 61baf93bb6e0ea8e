"""Every pocket model that the command offers: what it runs is the stock model, and its card says what its files say."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.pocket.card import write_card
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import weights_digest
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


def test_its_card_and_its_recipe_are_what_the_files_say(family, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "README.md").unlink()
    write_card(family, tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()
    recorded = json.loads((folder / "training.json").read_text())["config"]
    assert recorded == load_config(folder.with_name("config.yaml")).model_dump(mode="json")
    assert json.loads((folder / "evaluation.json").read_text())["weights"] == weights_digest(folder)
