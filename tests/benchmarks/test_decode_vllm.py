"""The parts of benchmarks/decode_vllm.py that need no engine."""

import pytest

from benchmarks.decode_vllm import LLAMA, TOY, cells, prompt, steady, write_model
from data_gen.core.fingerprint import checkpoint_tensors, fingerprint
from indexer_train.formats.bundle import load_scorer


def test_the_rate_is_of_the_time_in_which_all_are_decoded():
    """Alone at first, at a token a second; then two; then alone again."""
    assert steady([[0.0, 1.0, 2.0, 2.5, 3.0, 3.5], [2.0, 2.5, 3.0, 3.5, 4.5]]) == 4.0
    with pytest.raises(SystemExit, match="raise --new"):
        steady([[0.0, 1.0], [2.0, 3.0]])


def test_shorter_prompts_begin_longer_ones_and_come_later():
    assert prompt(3, 20, 50)["prompt_token_ids"] == prompt(3, 90, 50)["prompt_token_ids"][:20]
    assert prompt(3, 20, 50) != prompt(4, 20, 50)
    assert cells([16, 64], [1, 2, 8], 128) == [(64, 2), (64, 1), (16, 8), (16, 2), (16, 1)]


def test_the_bundle_is_of_the_model(tmp_path):
    folder = tmp_path / "model"
    write_model(folder, LLAMA | TOY | {"num_hidden_layers": 8})
    spec = load_scorer(folder / "bundle").spec
    assert spec.layers == [2, 4, 6]
    assert spec.backbone == fingerprint(checkpoint_tensors(folder))
