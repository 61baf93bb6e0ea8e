"""Damaged documents of a trace store, one damage after the other."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from data_gen.core.errors import InputError
from data_gen.core.files import save_tensors
from data_gen.core.keys import KEY_RECIPES
from data_gen.traces.store import TraceStore
from data_gen.traces.validate import check_document


@pytest.fixture
def shard(stores, tmp_path):
    """(a copy of a store, the file of one of its documents)."""
    shutil.copytree(stores[0].root, tmp_path / "store")
    store = TraceStore.open(tmp_path / "store")
    return store, store.paths()[2]


def check(store):
    for document in store:
        check_document(document, store.manifest)


def rewrite(path, change, meta=None):
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    if meta is not None:
        metadata["document"] = json.dumps(meta(json.loads(metadata["document"])))
    save_tensors(tensors, path, metadata)


def test_whole_documents_pass(shard):
    check(shard[0])
    assert all(document.checksum for document in shard[0])


@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
def test_one_flipped_bit_anywhere_is_found_by_reading(shard, where):
    store, path = shard
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path.name}: damaged trace"):
        check(store)


def cut_hidden(tensors):
    tensors["layers.0.hidden"] = tensors["layers.0.hidden"][:-1]


def cut_keys(tensors):
    tensors["layers.2.keys"] = tensors["layers.2.keys"][:-1]


def no_keys(tensors):
    del tensors["layers.2.keys"]


def chunk_beyond(tensors):
    tensors["oracle.chunks"][5] = 10_000


def rows_missing(tensors):
    tensors["oracle.pointers"] = tensors["oracle.pointers"][:-1]


def positions_jump(tensors):
    tensors["positions"][3] = 0


@pytest.mark.parametrize("damage", [cut_hidden, cut_keys, no_keys, chunk_beyond, rows_missing, positions_jump])
def test_what_does_not_fit_together_is_found_without_reading_it_all(shard, damage):
    store, path = shard
    rewrite(path, damage)
    with pytest.raises(InputError, match=f"{path.name}: damaged trace"):
        check(store)


def test_spans_outside_of_the_rows_are_found(shard):
    store, path = shard
    rewrite(path, lambda _: None, meta=lambda meta: meta | {"spans": [meta["spans"][0] | {"last": 10_000}]})
    with pytest.raises(InputError, match="spans leave"):
        check(store)


def test_numbers_that_are_none_are_found_beside_a_right_checksum(shard):
    store, path = shard

    def damage(tensors):
        tensors["layers.0.hidden"][1, 1] = torch.nan

    rewrite(path, damage)
    with pytest.raises(InputError, match="NaN"):
        check(store)


def test_a_document_without_a_checksum_is_refused(shard):
    store, path = shard
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(InputError, match="its checksum is missing"):
        check(store)


@pytest.mark.parametrize("key", KEY_RECIPES)
def test_keys_of_another_width_are_found(shard, key):
    store, path = shard
    backbone = replace(store.manifest.backbone, key=key)
    manifest = store.manifest.model_copy(update={"backbone": backbone})
    own, other = KEY_RECIPES[store.manifest.backbone.key], KEY_RECIPES[key]
    alike = (own.dtype, own.beside) == (other.dtype, other.beside)  # rows of such kinds have one shape
    with nullcontext() if alike else pytest.raises(InputError, match="keys is"):
        check_document(store.document(path), manifest)
    wider = replace(backbone, key_width=backbone.key_width + 1)
    with pytest.raises(InputError, match="keys is"):
        check_document(store.document(path), manifest.model_copy(update={"backbone": wider}))
