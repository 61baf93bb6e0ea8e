"""The store: whole documents only, continued and never rewritten."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from data_gen.backbones.dense import DenseBackbone
from data_gen.core.errors import InputError
from data_gen.core.files import write_sealed
from data_gen.generate import generate
from data_gen.text.needles import WORDINGS
from data_gen.text.plan import Plan
from data_gen.traces.store import TraceStore
from tests.conftest import tiny_model


def run(out, tokenizer, recipe, progress=lambda items, _: items, **changes):
    trace, backbone = recipe.trace.model_copy(update=changes), DenseBackbone(tiny_model("llama"))
    (store,) = generate(backbone, tokenizer, recipe.documents, trace, out, ["train"], progress)
    return store


def test_a_killed_run_continues_and_rewrites_nothing(tmp_path, tokenizer, tiny_recipe, stores):
    def killed_after_three(items, _):
        for number, item in enumerate(items):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tokenizer, tiny_recipe, killed_after_three)
    before = {path: path.stat().st_mtime_ns for path in TraceStore.open(tmp_path / "train", partial=True).paths()}
    assert len(before) == 3
    store = run(tmp_path, tokenizer, tiny_recipe)
    assert len(store.paths()) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    for ours, once in zip(store, stores[0], strict=True):
        assert ours.meta == once.meta and ours.checksum == once.checksum
        assert ours.path.read_bytes() == once.path.read_bytes()
    assert not list(tmp_path.rglob(".unfinished*"))


def test_a_failed_write_leaves_nothing(tmp_path, tokenizer, tiny_recipe, monkeypatch):
    broken = lambda tensors, path, metadata: path.write_bytes(b"x") and 1 / 0  # noqa: E731
    monkeypatch.setattr("data_gen.traces.store.save_tensors", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, tokenizer, tiny_recipe)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["plan.parquet", "manifest.json"]


def test_other_settings_are_refused(tmp_path, tokenizer, tiny_recipe):
    run(tmp_path, tokenizer, tiny_recipe)
    with pytest.raises(InputError, match="made with another trace"):
        run(tmp_path, tokenizer, tiny_recipe, window=8)


def test_a_store_begun_with_other_needles_is_not_continued(tmp_path, tokenizer, tiny_recipe, monkeypatch):
    run(tmp_path, tokenizer, tiny_recipe)
    monkeypatch.setitem(WORDINGS, "train", WORDINGS["train"][1:])
    with pytest.raises(InputError, match="made with another needles"):
        run(tmp_path, tokenizer, tiny_recipe)


def test_a_source_that_changed_is_refused_by_the_documents_name(tmp_path, tokenizer, tiny_recipe):
    source, texts = tmp_path / "texts.jsonl", [f"Text number {number} says so. " * 12 for number in range(20)]

    def traced(rows):
        source.write_text("\n".join(json.dumps({"text": text}) for text in rows))
        asked = {"source": str(source), "train": {"document": 3}, "heldout": {"document": 1}, "heldout_share": 0.3}
        documents = tiny_recipe.documents.model_copy(update=asked)
        return generate(DenseBackbone(tiny_model("llama")), tokenizer, documents, tiny_recipe.trace, tmp_path / "out")

    train, _ = traced(texts)
    second = train.paths()[1]
    content = second.read_bytes()
    second.unlink()
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    changed = [text.replace("says", "said") for text in texts]
    for other in (changed, ["Another text is on top. " * 14, *texts], texts[5:]):
        with pytest.raises(
            InputError, match=r"plan.parquet: train-document-\d{7} was made of a text that the source no longer"
        ):
            traced(other)
        assert files == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    (unseen,) = Plan(tmp_path / "out" / "plan.parquet").documents("heldout")
    altered = [text.replace("says", "said") if tokenizer(text).input_ids == unseen.tokens else text for text in texts]
    with pytest.raises(InputError, match="heldout-document-0000000 was made of a text"):
        traced(altered)
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    traced(texts)
    assert second.read_bytes() == content


def test_damaged_and_missing_stores_are_named(tmp_path, tokenizer, tiny_recipe):
    with pytest.raises(InputError, match="no trace store"):
        TraceStore.open(tmp_path)
    store = run(tmp_path, tokenizer, tiny_recipe)
    manifest = store.root / "manifest.json"
    whole = manifest.read_bytes()
    for damaged in (b"", b"{", b"\xff\xfe", b"[]"):
        manifest.write_bytes(damaged)
        with pytest.raises(InputError, match=r"manifest\.json: damaged manifest"):
            TraceStore.open(store.root)
        with pytest.raises(InputError, match=r"manifest\.json: damaged manifest"):
            run(tmp_path, tokenizer, tiny_recipe)
    manifest.write_bytes(whole)
    victim = store.paths()[2]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{victim.name}: damaged trace"):
        list(TraceStore.open(store.root))


def test_windows_of_serving_and_of_training(stores):
    trace = stores[0].manifest.trace
    for document in stores[0]:
        (span,) = document.meta.spans
        training = document.windows(serving=False)
        serving = document.windows(serving=True)
        assert set(map(tuple, serving.tolist())) <= set(map(tuple, training.tolist()))
        lengths = training.diff(dim=1).flatten()
        if span.tail:
            assert serving[0, 0] == span.serve and int(lengths.min()) == trace.tail
        else:
            assert set(lengths.tolist()) == {trace.window}
            assert serving[:, 0].tolist() == list(range(0, 64 - 15, 16))
        assert torch.all(document.labels(training).mass.sum(dim=1) <= 1 + 1e-3)


def test_a_store_that_does_not_name_its_backbone_is_continued(tmp_path, stores):
    store = TraceStore.open(shutil.copytree(stores[0].root, tmp_path / "store"))
    earlier = store.manifest.model_dump(mode="json")
    del earlier["backbone"]["name"]
    write_sealed(store.root / "manifest.json", earlier)
    named = store.manifest.model_copy(update={"backbone": replace(store.manifest.backbone, name="somebody/llama")})
    assert TraceStore.create(store.root, named).manifest == store.manifest
