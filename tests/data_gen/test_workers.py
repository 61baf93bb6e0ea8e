"""Any number of workers on one plan: the same bytes, whoever is killed, fails, or meets another at one document."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

import cli
from data_gen.backbones.dense import DenseBackbone
from data_gen.core.errors import InputError, explained
from data_gen.core.shard import Shard
from data_gen.generate import expected_bytes, generate, trace_plan
from data_gen.text.plan import Plan
from data_gen.traces.failures import FAILED, SHARDS, Failures, begin, begun, failed, parse_most
from data_gen.traces.store import TraceStore, file_of, number_of
from tests.conftest import tiny_model


def content(out):
    """Every file of a folder and its bytes."""
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def once(recipe, tmp_path_factory):
    """(folder, its files) traced by one process."""
    out = tmp_path_factory.mktemp("once") / "traces"
    subprocess.run(command(recipe, out), check=True, cwd=Path(cli.__file__).parent, capture_output=True)
    return out, content(out)


def command(recipe, out, *more):
    return [sys.executable, "-m", "cli", "generate", str(recipe), "--out", str(out), *map(str, more)]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_leaves_the_same_bytes(once, recipe, tmp_path, lookahead, count):
    for index in reversed(range(count)):
        code, printed, _ = lookahead("generate", recipe, "--out", tmp_path, "--shard", f"{index}/{count}")
        assert code == 0 and f"to trace (shard {index}/{count}): " in printed
        if index:
            code, _, line = lookahead("train", recipe, "--traces", tmp_path / "train", "--out", tmp_path / "run")
            left = ", ".join(f"{each}/{count}" for each in range(index))
            assert code == 2 and "documents are missing (train-text-0000000" in line and f": shards {left};" in line
    assert content(tmp_path) == once[1]


def test_processes_of_torchrun_need_no_group(once, recipe, tmp_path):
    """Two processes as torchrun starts them, and the number of workers changes on the way."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", "-m", "cli"]
    run = [sys.executable, *torchrun, "generate", str(recipe), "--out", str(tmp_path)]
    done = subprocess.run(run, cwd=Path(cli.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to trace (shard 0/2): 6 documents" in done.stdout and "to trace (shard 1/2): 6 documents" in done.stdout
    assert content(tmp_path) == once[1]


def test_a_killed_worker_loses_nothing_and_others_finish(once, recipe, tmp_path, lookahead):
    worker = subprocess.Popen(command(recipe, tmp_path, "--shard", "0/2"), cwd=Path(cli.__file__).parent,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("doc_*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    early = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("doc_*")}
    assert early
    for index in range(3):
        assert lookahead("generate", recipe, "--out", tmp_path, "--shard", f"{index}/3")[0] == 0
    assert content(tmp_path) == once[1]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in early.items())


def test_two_workers_on_the_same_documents_harm_nothing(once, recipe, tmp_path):
    both = [subprocess.Popen(command(recipe, tmp_path), cwd=Path(cli.__file__).parent, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    told = [worker.communicate()[1] for worker in both]
    assert [worker.returncode for worker in both] == [0, 0], told
    assert content(tmp_path) == once[1]


class Failing:
    """A backbone that cannot trace the documents `bad` (by their first tokens), for the reason `error`."""

    def __init__(self, bad, error):
        self.own, self.bad, self.error = DenseBackbone(tiny_model("llama")), bad, error
        self.model, self.info, self.check = self.own.model, self.own.info, self.own.check
        self.asked = 0

    def trace(self, tokens, positions, config):
        self.asked += 1
        if tokens in self.bad:
            raise self.error
        return self.own.trace(tokens, positions, config)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError("no room"),
    InputError("layer 3: its keys reach 1e+06, more than fp16 can hold, in which traces store keys"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_one_bad_document_stops_nothing_and_is_tried_again(once, tiny_recipe, tokenizer, tmp_path, error):
    plan = Plan(once[0] / "plan.parquet")
    (tmp_path / "plan.parquet").write_bytes((once[0] / "plan.parquet").read_bytes())
    bad = [document.tokens for document in (plan.document("train", 1), plan.document("train", 6))]
    said = []

    def trace(backbone, most="2"):
        settings = (plan, tiny_recipe.trace, tmp_path, Shard(), most)
        return trace_plan(backbone, *settings, lambda items, _: items, said.append)

    backbone = Failing(bad, error)
    assert trace(backbone) and backbone.asked == 12 and len(list(tmp_path.rglob("doc_*"))) == 10
    assert said[-3].startswith("2 documents failed, see ") and said[-2].endswith(", 2 missing")
    lines = [json.loads(line) for line in (tmp_path / FAILED).read_text().splitlines()]
    names = ["train-text-0000001", "train-single-0000002"]
    assert [line["document"] for line in lines] == failed(tmp_path) == names
    assert all(line["reason"] in str(error) and line["side"] == "train" for line in lines)
    backbone = Failing(bad, error)
    assert not trace(backbone, "1") and backbone.asked == 2 and "more than --max-failures 1 allows" in said[-1]
    assert trace(DenseBackbone(tiny_model("llama"))) and content(tmp_path) == once[1]


def test_a_share_that_may_fail_is_of_what_was_planned(once, tiny_recipe, tmp_path):
    """Not of what an earlier run left over, which would allow less with every turn."""
    plan = Plan(once[0] / "plan.parquet")
    shutil.copytree(once[0], tmp_path, dirs_exist_ok=True)
    for number in (1, 6):
        (tmp_path / "train" / "0000" / f"doc_{number:07d}.safetensors").unlink()
    backbone = Failing([plan.document("train", number).tokens for number in (1, 6)], MemoryError("no room"))
    given = backbone, plan, tiny_recipe.trace, tmp_path
    assert trace_plan(*given, Shard(), "15%", lambda items, _: items, lambda _: None) and len(failed(tmp_path)) == 2


def test_inspect_shows_how_far_a_running_plan_is(once, tmp_path, lookahead):
    (tmp_path / "plan.parquet").write_bytes((once[0] / "plan.parquet").read_bytes())
    for number in (0, 5):
        path = Path("train") / file_of(number)
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(once[1][path])
        os.utime(tmp_path / path, (number, number))
    line = {"document": "train-text-0000001", "reason": "no room", "shard": "0/1", "side": "train"}
    (tmp_path / FAILED).write_text(json.dumps(line))
    rate = Plan(tmp_path / "plan.parquet").brief["train"][5]["length"] / 5
    size = sum(len(once[1][Path("train") / file_of(number)]) for number in (0, 5)) / 2**20
    code, printed, _ = lookahead("inspect", tmp_path)
    assert code == 0 and f"2 of 12 documents, 1 failed, {size:,.1f} MiB, the latest at " in printed
    assert f", {rate:,.0f} tokens/s, " in printed and " minutes left" in printed


def test_a_share_of_a_store_is_checked_alone(once, tmp_path, lookahead):
    store = shutil.copytree(once[0] / "train", tmp_path / "train")
    damaged = store / file_of(4)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for index in range(3):
        code, printed, line = lookahead("inspect", store, "--shard", f"{index}/3")
        own = len(range(index, 8, 3))
        assert code == (1 if index == 1 else 0), line
        assert f"{own} documents of a trace store" in printed
        assert f"{own - (index == 1)} whole, {int(index == 1)} damaged" in printed


def test_files_sort_as_numbers_beyond_a_hundred_thousand(once, tmp_path):
    numbers = [0, 999, 1000, 99_999, 100_000, 100_001, 999_999, 1_000_000, 9_999_999]
    assert sorted(map(file_of, numbers)) == [file_of(number) for number in numbers]
    assert max(Counter(Path(file_of(number)).parent for number in range(99_000, 103_500)).values()) == 1000
    manifest = TraceStore.open(once[0] / "train").manifest
    plan = {number: (f"train-text-{number:07d}", "") for number in reversed(numbers)}
    for number in numbers:
        (tmp_path / file_of(number)).parent.mkdir(exist_ok=True)
        (tmp_path / file_of(number)).touch()
    paths = TraceStore(tmp_path, manifest.model_copy(update={"plan": plan})).paths()
    assert paths == sorted(paths) and [number_of(path) for path in paths] == numbers


def test_too_many_failures_end_in_1(recipe, tmp_path, lookahead, monkeypatch):
    def broken(*of):
        raise KeyError("rope")

    monkeypatch.setattr(DenseBackbone, "trace", broken)
    monkeypatch.setattr("data_gen.backbones.load._probe", lambda backbone: None)
    code, printed, _ = lookahead("generate", recipe, "--out", tmp_path, "--max-failures", "25%")
    assert code == 1 and "4 documents failed, more than --max-failures 25% allows" in printed
    assert len(failed(tmp_path)) == 4 and not list(tmp_path.rglob("doc_*"))
    for most in ("some", "-1", "5%%", "1.5", "9" * 400, "9" * 400 + "%", "9" * 5000):
        code, _, line = lookahead("generate", recipe, "--out", tmp_path / "new", "--max-failures", most)
        assert code == 2 and f"--max-failures {most}: give a number, or a share such as 5%" in line
        assert not (tmp_path / "new").exists()


def note_a_failure(out):
    Failures(out, Shard(), "1", 1).add("one", "train", "why")


def note_a_beginning(out):
    with begun(out, "one"):
        pass


@pytest.mark.parametrize("write", [note_a_failure, note_a_beginning])
def test_a_full_disk_is_named_where_failures_and_deaths_are_noted(tmp_path, write):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="once there is room") as caught:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert explained(caught.value).startswith(f"{tmp_path}/")


def test_a_death_that_cannot_be_noted_keeps_the_earlier_ones(tmp_path, monkeypatch):
    for earlier in range(2):
        with suppress(ZeroDivisionError), monkeypatch.context() as killed, begun(tmp_path, "one") as deaths:
            assert deaths == earlier
            killed.setattr(Path, "unlink", lambda *_, **__: 1 / 0)  # a killed worker removes nothing
            raise ZeroDivisionError
    with monkeypatch.context() as full, pytest.raises(OSError, match="once there is room"):
        full.setattr("builtins.open", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with begun(tmp_path, "one"):
            pass
    with begun(tmp_path, "one") as deaths:
        assert deaths == 2


def test_a_line_that_was_cut_short_takes_no_other_with_it(tmp_path):
    note_a_failure(tmp_path)
    (tmp_path / FAILED).write_bytes((tmp_path / FAILED).read_bytes()[:-9])
    Failures(tmp_path, Shard(), "1", 1).add("two", "train", "why")
    assert failed(tmp_path) == ["two"]


def test_how_many_died_is_counted_once_it_is_ones_turn(tmp_path, monkeypatch):
    """Somebody else's note, made between opening the file and locking it, counts."""
    note = tmp_path / SHARDS / "one.begun"
    note.parent.mkdir()
    monkeypatch.setattr("fcntl.flock", lambda *_: note.write_text("\n" * 3))
    with begun(tmp_path, "one") as deaths:
        assert deaths == 3


def test_a_share_allows_at_least_one():
    assert [parse_most("10%", count) for count in (1, 10, 11, 1000)] == [1, 1, 2, 100]
    assert parse_most("0", 1000) == 0 and parse_most("0.5%", 1000) == 5


def test_a_shard_needs_no_source_and_one_process_compares_it(recipe, tmp_path, lookahead):
    settings = yaml.safe_load(recipe.read_text())
    source = tmp_path / "source.jsonl"
    rows = [json.dumps({"text": f"{number} " + "It is written down once. " * 40}) for number in range(60)]
    source.write_text("\n".join(rows))
    settings["documents"] |= {"source": str(source), "train": {"text": 2}, "heldout": {"text": 1}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    generate = ("generate", tmp_path / "own.yaml", "--out", tmp_path / "out")
    assert lookahead(*generate, "--plan-only")[0] == 0
    source.unlink()
    for index in range(2):
        assert lookahead(*generate, "--shard", f"{index}/2")[0] == 0
    source.write_text("\n".join(row.replace("once", "twice") for row in rows))
    assert lookahead(*generate, "--shard", "0/2")[0] == 0
    for whole in ((), ("--plan-only",)):
        code, _, line = lookahead(*generate, *whole)
        assert code == 2 and "was made of a text that the source no longer has there" in line


def test_the_plan_alone_needs_no_model(recipe, tmp_path, lookahead, monkeypatch):
    monkeypatch.setattr("data_gen.generate.load_backbone", None)
    assert lookahead("generate", recipe, "--out", tmp_path, "--plan-only")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.parquet"]


def test_the_bytes_said_before_are_about_those_of_the_traces(once, tiny_recipe):
    plan, stores = Plan(once[0] / "plan.parquet"), [TraceStore.open(once[0] / side) for side in ("train", "heldout")]
    info, trace = stores[0].manifest.backbone, tiny_recipe.trace
    brief = [row for store in ("train", "heldout") for row in plan.brief[store]]
    expected = sum(expected_bytes(row["length"], row["rows"], info, trace) for row in brief)
    tensors = sum(value.nbytes for store in stores for document in store for value in document.tensors().values())
    assert 0.9 < tensors / expected < 1.1


def test_files_of_another_store_or_place_are_refused(once, tiny_recipe, tokenizer, tmp_path):
    """Whole, sealed files each; of the same backbone, and some of the very same text."""
    backbone, others = DenseBackbone(tiny_model("llama")), []
    for name, changes in {"seed": {"seed": 1}, "count": {"train": {"text": 4, "single": 3}}}.items():
        documents = tiny_recipe.documents.model_copy(update=changes)
        others.append(generate(backbone, tokenizer, documents, tiny_recipe.trace, tmp_path / name, ["train"])[0])
    store = generate(backbone, tokenizer, tiny_recipe.documents, tiny_recipe.trace, tmp_path / "own", ["train"])[0]
    path, own = store.paths()[2], store.paths()[2].read_bytes()
    for other in others:
        path.write_bytes(other.paths()[2].read_bytes())
        with pytest.raises(InputError, match=f"{path.name}: damaged trace .it is of a store with other settings"):
            list(store)
    path.write_bytes(store.paths()[3].read_bytes())
    with pytest.raises(InputError, match=r"it holds train-text-0000003 \w+, not train-text-0000002 \w+"):
        list(store)
    path.write_bytes(own)
    extra = path.with_name("doc_0000008.safetensors")
    extra.write_bytes(own)
    with pytest.raises(InputError, match=f"{extra.name}: not among the documents of this store"):
        TraceStore.open(store.root)
    extra.unlink()
    path.unlink()
    with pytest.raises(InputError, match=r"1 of 8 documents are missing \(train-text-0000002\); run the command"):
        TraceStore.open(store.root)
    assert len(TraceStore.open(store.root, partial=True)) == 7


def test_a_partial_store_is_trained_on_when_asked(once, recipe, tmp_path, lookahead):
    for file, data in once[1].items():
        (tmp_path / "traces" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "traces" / file).write_bytes(data)
    begin(tmp_path / "traces", Shard(1, 4))
    (tmp_path / "traces" / "train" / "0000" / "doc_0000006.safetensors").unlink()
    traces = ("--traces", tmp_path / "traces" / "train")
    code, _, line = lookahead("train", recipe, *traces, "--out", tmp_path / "run")
    assert code == 2 and "1 of 8 documents are missing (train-single-0000002): shards 2/4; " in line
    code, printed, _ = lookahead("inspect", tmp_path / "traces" / "train")
    assert code == 0 and "1 of 8 documents: shards 2/4" in printed
    assert lookahead("train", recipe, *traces, "--out", tmp_path / "run", "--partial")[0] == 0
    assert (tmp_path / "traces" / SHARDS).exists() and os.listdir(tmp_path / "traces" / SHARDS) == ["1-of-4"]
