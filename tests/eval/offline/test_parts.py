"""Workers share an evaluation: their parts, merged, are what one process measures, to the last bit."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data_gen.core.errors import InputError
from eval.offline import verbs
from eval.offline.evaluation import Evaluation
from eval.offline.parts import load_part, save_part
from eval.offline.verbs import EvaluateOptions, evaluate_traces
from indexer_train.load import load_indexer
from recipes import load_recipe


def results(out):
    return json.loads((out / "results.json").read_text())


def test_shards_merge_to_what_one_process_measures(finished, recipe, tmp_path, lookahead):
    asked = ("evaluate", recipe, "--indexer", finished / "indexer", "--traces", finished / "traces" / "heldout")
    assert lookahead(*asked, "--out", tmp_path / "one")[0] == 0
    many = tmp_path / "many"
    code, printed, _ = lookahead(*asked, "--out", many, "--shard", "1/3")
    assert code == 0 and "3 of 4 documents are not measured yet" in printed and not (many / "results.json").exists()
    (part,) = many.rglob("doc_*")
    stamp = part.stat().st_mtime_ns
    code, printed, _ = lookahead(*asked, "--out", many, "--shard", "0/2")
    assert "1 of 4 documents are not measured yet" in printed and part.stat().st_mtime_ns == stamp
    code, printed, _ = lookahead(*asked, "--out", many, "--shard", "1/2")
    assert code == 0 and "results: " in printed and not (many / "parts").exists()
    assert results(many) == results(tmp_path / "one")
    pair = ("--compare", *[finished / "indexer"] * 2)
    assert lookahead(*asked[:2], *pair, *asked[4:], "--out", many, "--shard", "0/2")[0] == 0
    assert lookahead(*asked, "--every-token", "--out", many, "--shard", "0/2")[0] == 0
    assert len(list((many / "parts").iterdir())) == 2  # other questions, other parts
    assert lookahead(*asked, "--every-token", "--out", many, "--shard", "1/2")[0] == 0
    (others,) = (many / "parts").iterdir()  # whoever is done takes nobody else's
    assert [part.parent.parent for part in others.rglob("doc_*")] == [others] * 2
    assert lookahead(*asked[:2], *pair, *asked[4:], "--out", many, "--shard", "1/2")[0] == 0
    assert not (many / "parts").exists()


def test_two_workers_that_come_to_merge_at_once_write_the_results_once(finished, recipe, tmp_path, monkeypatch):
    """The first waits, in the middle of merging, until the second has come as far as it can."""
    indexers, traces, out = {"indexer": finished / "indexer"}, finished / "traces" / "heldout", tmp_path / "out"
    merge, enter, came, merged, told = Evaluation.merged, verbs.alone, threading.Semaphore(0), [], []

    def come(folder):
        came.release()
        return enter(folder)

    def slowly(evaluation, parts):
        merged.append(len(parts))
        assert came.acquire(timeout=60) and came.acquire(timeout=60)
        time.sleep(0.3)  # for whoever is not kept out
        return merge(evaluation, parts)

    monkeypatch.setattr(verbs, "alone", come)
    monkeypatch.setattr(Evaluation, "merged", slowly)
    given = load_recipe(str(recipe)).train, indexers, traces, out, str(recipe), EvaluateOptions()
    with ThreadPoolExecutor() as workers:
        for done in [workers.submit(evaluate_traces, *given, told.append, lambda items, _: items) for _ in range(2)]:
            done.result()
    assert merged == [4] and sum("results: " in line for line in told) == 1
    assert len(results(out)["documents"]) and not (out / "parts").exists() and not list(out.glob(".unfinished*"))


def test_parts_outlast_results_that_no_disk_had_room_for(finished, recipe, tmp_path, monkeypatch, lookahead):
    asked = ("evaluate", recipe, "--indexer", finished / "indexer", "--traces", finished / "traces" / "heldout")
    with monkeypatch.context() as patch:
        patch.setattr(verbs, "write_results", lambda out, **_: (out / "no such folder" / "results.json").write_text(""))
        code, _, line = lookahead(*asked, "--out", tmp_path)
        assert code == 2 and "results.json" in line and len(list(tmp_path.rglob("doc_*"))) == 4
    assert lookahead(*asked, "--out", tmp_path)[0] == 0 and not (tmp_path / "parts").exists()


def test_a_worker_takes_its_own_gpu_before_anything_is_loaded(finished, recipe, tmp_path, lookahead, monkeypatch):
    """On an imitated machine of two: what is loaded to `cuda` goes to the one that was chosen."""

    def chosen(device):
        raise InputError(f"GPU {device}")

    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    asked = ("evaluate", recipe, "--indexer", finished / "indexer", "--traces", finished / "traces" / "heldout")
    code, _, line = lookahead(*asked, "--out", tmp_path, "--shard", "3/4")
    assert code == 2 and "GPU 1" in line


def test_a_part_reads_back_to_the_last_bit_and_damage_is_named(finished, stores, tmp_path):
    evaluation = Evaluation({"indexer": load_indexer(finished / "indexer")}, stores[1], 0.05, 0.1, False)
    part = evaluation.part(next(iter(stores[1])))
    save_part(part, tmp_path / "a.safetensors")
    read = load_part(tmp_path / "a.safetensors")
    assert (read.meta, read.sums) == (part.meta, part.sums) and len(read.recall) == len(part.recall)
    save_part(read, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert read.scores.equal(part.scores) and read.truth.equal(part.truth)
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="damaged part of an evaluation"):
        load_part(tmp_path / "a.safetensors")


def test_mining_by_shards_is_mining(finished, recipe, tmp_path, lookahead):
    import shutil

    pytest.importorskip("faiss")
    found = []
    for name, shards in {"one": [()], "two": [("--shard", "1/2"), ("--shard", "0/2")]}.items():
        traces = shutil.copytree(finished / "traces" / "train", tmp_path / name)
        for shard in shards:
            mine = ("mine", recipe, "--indexer", finished / "indexer", "--traces", traces, "--count", 8)
            assert lookahead(*mine, *shard)[0] == 0
        folder = traces / "hard_negatives"
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("doc_*")})
    assert len(found[0]) == 8 and found[0] == found[1]
