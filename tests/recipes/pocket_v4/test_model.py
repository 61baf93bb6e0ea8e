"""The committed weights under the stock class and stock eager attention, fp32 on the CPU: no code of ours inside."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipes.pocket_v4
from recipes.pocket.card import write_card
from recipes.pocket.evaluate import documents_of, weights_digest
from recipes.pocket.tasks import solved
from recipes.pocket.words import build_lexicon, build_tokenizer
from recipes.pocket_v4.model import FAMILY

FOLDER = Path(recipes.pocket_v4.__file__).parent / "model"
LENGTH, DOCUMENTS = 1024, 3


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@torch.inference_mode()
def count_solved(model, tokenizer, documents):
    right = 0
    for document in documents:
        tokens = tokenizer(f"{document.prompt} {document.answer}", return_tensors="pt")
        assert tokens.input_ids.shape == (1, LENGTH)
        rows = slice(-len(document.answer.split()) - 1, -1)
        predicted = model(**tokens, use_cache=False).logits[0, rows].argmax(-1)
        right += solved(document, tokenizer.decode(predicted))
    return right


@pytest.mark.parametrize("task", ["single", "multi_key"])
def test_needles_are_found_and_only_through_sparse_attention(model, tokenizer, shipped, task):
    documents = documents_of(shipped, task, LENGTH, DOCUMENTS)
    assert [indexer.index_topk for indexer in FAMILY.indexers(model)] == [64] * 3 < [LENGTH // 4] * 3
    assert count_solved(model, tokenizer, documents) >= DOCUMENTS - 1
    FAMILY.set_topk(model, 0)
    try:
        assert count_solved(model, tokenizer, documents) <= 1
    finally:
        FAMILY.set_topk(model, model.config.index_topk)


@pytest.mark.parametrize("task", ["multi_key", "tracking"])
def test_greedy_decoding_agrees_with_the_forced_check(model, tokenizer, shipped, task):
    (document,) = documents_of(shipped, task, LENGTH, 1)
    prompt = tokenizer(document.prompt, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    completion = tokenizer.decode(made)
    assert solved(document, completion) == (count_solved(model, tokenizer, [document]) == 1)
    assert completion.split()[-1] == "."  # generation ends with the sentence


def test_the_folder_is_small_whole_and_stock(model):
    assert (FOLDER / "model.safetensors").stat().st_size <= 20e6
    settings = json.loads((FOLDER / "config.json").read_text())
    assert settings["architectures"] == ["DeepseekV4ForCausalLM"] and settings["dtype"] == "bfloat16"
    assert "auto_map" not in settings
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert (settings["head_dim"], settings["index_head_dim"]) == (512, 128) and settings["index_n_heads"] >= 16


def test_the_tokenizer_is_the_recipes_and_loses_nothing(tokenizer, shipped):
    lexicon = build_lexicon(shipped.vocabulary)
    assert tokenizer.get_vocab() == build_tokenizer(lexicon).get_vocab()
    text = " ".join(lexicon.vocabulary[4:])
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_accuracy_of_these_weights_reaches_the_bars():
    report = json.loads((FOLDER / "evaluation.json").read_text())
    assert report["weights"] == weights_digest(FOLDER)
    assert report["documents"] >= 60 and report["comparisons"] >= 20
    table = report["lengths"]
    assert table["4096"]["topk"]["single"] >= 0.95 and table["4096"]["topk"]["multi_key"] >= 0.90
    assert min(table["8192"]["topk"][task] for task in ("single", "multi_key")) >= 0.85
    assert all(row["closed"][task] <= 0.10 for row in table.values() for task in ("single", "multi_key"))


def test_the_card_names_lengths_that_were_not_measured(tmp_path):
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    report = json.loads((FOLDER / "evaluation.json").read_text())
    del report["lengths"]["2048"]
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    write_card(FAMILY, tmp_path)
    assert "not measured: 2048, 16384." in (tmp_path / "README.md").read_text()
