"""Where a backbone comes from."""

from pathlib import Path

import pytest
import torch

from data_gen.backbones.load import load_backbone, resolve
from data_gen.config import BackboneConfig
from data_gen.errors import InputError
from tests.conftest import tiny_model


def test_the_tiny_backbone_is_the_same_every_time_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    (one, tokenizer), (two, _) = (load_backbone(BackboneConfig(path="tiny")) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    text = "one token\na character"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer(text)["input_ids"]) == len(text)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, _ = load_backbone(BackboneConfig(path="~/model"))
    assert model.config.model_type == "llama"
    with pytest.raises(InputError, match="no such file or folder"):
        load_backbone(BackboneConfig(path="~/nothing"))


def test_a_file_of_an_installed_package_is_found_without_importing_it():
    assert Path(resolve("package:transformers/__init__.py")).name == "__init__.py"
    with pytest.raises(InputError, match="not installed"):
        resolve("package:no_such_package_here/model.gguf")
