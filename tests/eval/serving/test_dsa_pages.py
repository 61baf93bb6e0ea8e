"""An exported bundle of a DSA model, asked as a serving engine asks it: ids of 64-token pages to prefetch."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_gen.backbones.load import adapter
from data_gen.core.chunks import Chunking
from eval.runtime.runtime import LSARuntime
from eval.serving.level1 import open_level1
from eval.serving.select import Limits
from indexer_train.config import IndexerConfig
from indexer_train.formats.bundle import export_bundle, load_scorer
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget
from indexer_train.spec import IndexerSpec
from recipes.pocket.config import load_config
from recipes.pocket.evaluate import documents_of

PAGE, CAP, MADE = 64, 12, 140
"""Tokens of a page; ids that an engine reserves room for; tokens decoded, of three windows."""


@pytest.fixture(scope="module")
def folder(request):
    return request.config.rootpath / "recipes/pocket_dsa/model"


@pytest.fixture(scope="module")
def backbone(folder):
    return adapter(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def bundle(backbone, tmp_path_factory):
    """Untrained: what it asks for is arbitrary, and it must be the same either way."""
    torch.manual_seed(3)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=4, rank=8), layers=[2, 5], hidden=backbone.info.hidden, window=64,
        key_width=backbone.info.key_width, key=backbone.info.key, chunking=Chunking(tokens=PAGE, sink=0, recent=1),
        backbone=backbone.info.fingerprint, rope=backbone.info.rope, selections=[Budget(budget=0.3)],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dsa") / "bundle"
    export_bundle(MemoryIndexer.from_spec(spec, device="cpu"), folder)
    return folder


class Engine:
    """What a serving engine has of its own: what enters the attention blocks, and the index keys of its pool."""

    def __init__(self, model, layers):
        self.hidden, self.keys = ({layer: [] for layer in layers} for _ in range(2))
        for layer in layers:
            attention = model.get_decoder().layers[layer].self_attn
            attention.register_forward_pre_hook(
                lambda _, __, given, layer=layer: self.hidden[layer].append(given["hidden_states"][0]), with_kwargs=True
            )
            attention.indexer.k_norm.register_forward_hook(
                lambda _, __, keys, layer=layer: self.keys[layer].append(keys[0])
            )

    def asks(self, position):
        """Hidden states [1, L, hidden] at a position, and the keys [N, L, d] of the pages that are full by then."""
        full = (position + 1) // PAGE
        hidden = [torch.cat(read)[position] for read in self.hidden.values()]
        keys = [torch.cat(read)[: full * PAGE].unflatten(0, (full, PAGE)).mean(1) for read in self.keys.values()]
        return torch.stack(hidden)[None].bfloat16(), torch.stack(keys, dim=1).half()


def test_pages_asked_of_a_bundle_are_those_of_the_runtime(folder, backbone, bundle):
    (document,) = documents_of(load_config(folder.with_name("config.yaml")), "multi_key", 1500, 1)
    prompt = AutoTokenizer.from_pretrained(folder)(document.prompt, return_tensors="pt")
    runtime = LSARuntime.from_bundle(bundle, backbone.model)
    engine, sets = Engine(backbone.model, runtime.spec.layers), {}

    def watch(*_, **__):
        sets[runtime.host.position] = runtime.host.cache.resident()[0]
        return False

    options = {"max_new_tokens": MADE, "do_sample": False, "eos_token_id": None, "stopping_criteria": [watch]}
    runtime.generate(**prompt, **options)
    assert len(runtime.windows) == 3

    level1 = open_level1(load_scorer(bundle), Limits(cap=CAP))
    for window in runtime.windows:
        hidden, keys = engine.asks(window.position)
        asked = level1.resident(level1.pack(hidden, torch.tensor([window.position])), keys)
        count, resident = int(asked.counts[0]), sets[window.position + 1]
        assert asked.ids.shape == (1, CAP) and asked.ids.dtype == torch.int32 and 1 < count < window.chunks
        assert asked.ids[0, :count].tolist() == resident[resident < window.chunks].tolist()
        assert asked.ids[0, count:].tolist() == [-1] * (CAP - count)
