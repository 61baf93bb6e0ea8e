"""Dumps in the release's format: what is kept, what is dropped and counted, what is refused."""

import collections
import hashlib
import io
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli import app
from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.key_bytes import encode_keys
from data_gen.core.shard import Shard
from data_gen.flashmemory.document import Dropped, read_document
from data_gen.flashmemory.folder import import_dumps
from data_gen.flashmemory.unpickle import load_dump
from data_gen.traces.store import TraceStore
from eval.offline.evaluation import threshold_for
from indexer_train.config import IndexerConfig, TrainConfig
from indexer_train.training.trainer import train
from tests.eval.offline.recalled import evaluate_recall

LAYERS = [10, 12]
TOKENS, CHUNKS = 20, 12
TRACE = TraceConfig(
    chunking=Chunking(tokens=4, sink=1, recent=2), layers=LAYERS, oracle="indexer", window=8, tail=4, text_rows=8
)


def dump(seed=0, tokens=TOKENS, chunks=CHUNKS, labels=None):
    """Tensors as the server writes them; the first decode token is at position 27, so 7 chunks are visible to it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in [6, *LAYERS]:
        tensors[f"hidden_layer_{layer}"] = torch.randn(tokens, 4096, generator=generator).bfloat16()
        tensors[f"compk_layer_{layer}"] = encode_keys(torch.randn(chunks, 128, generator=generator))
        tensors[f"positions_layer_{layer}"] = torch.arange(27, 27 + tokens)
    for row in range(3):
        tensors[f"logits_layer_10_token_{row}"] = torch.randn(7, generator=generator).bfloat16()
        tensors[f"q_layer_10_token_{row}"] = torch.randn(1, 8192, generator=generator).bfloat16()
        tensors[f"weights_layer_10_token_{row}"] = torch.randn(1, 64, 1, generator=generator).bfloat16()
    counts = torch.randint(0, 4, (tokens,), generator=generator) if labels is None else torch.full((tokens,), labels)
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    golden = [torch.randperm(7, generator=generator)[:count] for count in counts.tolist()]
    tensors["label_indices"] = torch.cat(golden).int()
    tensors["label_scores"] = torch.randint(3, 22, (int(pointers[-1]),), generator=generator).int()
    tensors["label_pointers"] = pointers.int()
    return tensors


def save(folder, number, tensors):
    folder.mkdir(exist_ok=True)
    path = folder / f"doc_{number:05d}.pkl"
    path.write_bytes(pickle.dumps(tensors, protocol=4))
    return path


def imported(folder, root, trace=TRACE):
    return import_dumps(folder, root, trace, lambda items, _: items)


def test_a_folder_becomes_a_store(tmp_path):
    folder, root = tmp_path / "dumps", tmp_path / "store"
    originals = {number: dump(seed=number) for number in (0, 3, 17)}  # numbering gaps
    for number, tensors in originals.items():
        save(folder, number, tensors)
    client = {"prompt": [{"role": "user", "content": "日本"}], "response": "ok", "original_index": 4, "rid": "a"}
    (folder / "doc_00003.json").write_text(json.dumps(client))
    server = {"filename": "doc_00003.pkl", "doc_index": 3, "rid": "a", "n_decode_tokens": TOKENS}
    (folder / "server_metadata.jsonl").write_text(json.dumps(server) + "\n\n")
    report = imported(folder, root)
    assert vars(report) == {"written": 3, "present": 0, "dropped": Dropped(), "failed": []}
    store = TraceStore.open(root)
    assert [path.name for path in store.paths()] == [f"doc_{n:07d}.safetensors" for n in originals]
    assert store.manifest.backbone.rope.factor == 16 and store.manifest.trace.oracle == "indexer"
    for document, tensors in zip(store, originals.values(), strict=True):
        for layer in LAYERS:
            assert torch.equal(document.hidden(layer), tensors[f"hidden_layer_{layer}"])
            assert torch.equal(document.keys(layer), tensors[f"compk_layer_{layer}"])
        assert torch.equal(document.positions, tensors["positions_layer_10"])
        golden = document.golden
        assert torch.equal(golden.pointers, tensors["label_pointers"].long())
        assert torch.equal(golden.chunks, tensors["label_indices"])
        assert torch.equal(golden.votes, tensors["label_scores"])
        native = document.native(10)
        assert list(native) == [0, 1, 2] and document.native(12) == {}
        assert torch.equal(native[1].logits, tensors["logits_layer_10_token_1"])
        assert torch.equal(native[1].query.flatten(), tensors["q_layer_10_token_1"][0])
        assert torch.equal(native[2].weights, tensors["weights_layer_10_token_2"].flatten())
    sources = [document.source for document in store]
    digest = hashlib.sha256((folder / "doc_00003.pkl").read_bytes()).hexdigest()
    assert sources[1] == {"client": client, "server": server, "dropped": vars(Dropped()), "sha256": digest}
    assert sources[0]["client"] == {} and sources[0]["server"] == {}


def test_finished_documents_stay_and_other_settings_are_refused(tmp_path):
    folder, root = tmp_path / "dumps", tmp_path / "store"
    save(folder, 0, dump())
    imported(folder, root)
    before = (root / "0000" / "doc_0000000.safetensors").stat().st_mtime_ns
    save(folder, 1, dump(seed=1))
    report = imported(folder, root)
    assert (report.written, report.present) == (1, 1)
    assert (root / "0000" / "doc_0000000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another trace"):
        imported(folder, root, TRACE.model_copy(update={"window": 4}))


def test_shards_import_what_one_process_does(tmp_path):
    folder = tmp_path / "dumps"
    for number in (0, 3, 4, 17):
        save(folder, number, dump(seed=number))
    imported(folder, tmp_path / "one")
    for index in (2, 0, 1):
        written = import_dumps(folder, tmp_path / "many", TRACE, lambda items, _: items, Shard(index, 3)).written
        assert written == sum(number % 3 == index for number in (0, 3, 4, 17))
        if index == 2:
            with pytest.raises(InputError, match=r"3 of 4 documents are missing \(doc_00000, .*\): shards 0/3, 1/3;"):
                TraceStore.open(tmp_path / "many")
    files = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
             for root in (tmp_path / "one", tmp_path / "many")]  # fmt: skip
    assert files[0] == files[1]


def test_two_folders_do_not_pass_for_one(tmp_path):
    """Both count from 0: the second one's documents must not count as present, whatever their size."""
    sizes = {save(tmp_path / name, 0, dump(seed=ord(name), labels=2)).stat().st_size for name in "ab"}
    assert len(sizes) == 1
    imported(tmp_path / "a", tmp_path / "store")
    with pytest.raises(InputError, match="doc_00000 is not the document that the store was begun with"):
        imported(tmp_path / "b", tmp_path / "store")
    (tmp_path / "store" / "0000" / "doc_0000000.safetensors").write_bytes(b"x")
    assert "damaged trace" in imported(tmp_path / "a", tmp_path / "store").failed[0]


@settings(max_examples=40)
@given(st.lists(st.lists(st.tuples(st.integers(-3, CHUNKS + 3), st.integers(3, 21)), max_size=5), min_size=TOKENS,
                max_size=TOKENS))  # fmt: skip
def test_impossible_labels_are_dropped_and_counted(labels):
    tensors = dump()
    flat = [pair for row in labels for pair in row]
    tensors["label_indices"] = torch.tensor([chunk for chunk, _ in flat], dtype=torch.int32)
    tensors["label_scores"] = torch.tensor([score for _, score in flat], dtype=torch.int32)
    tensors["label_pointers"] = torch.tensor(np.cumsum([0] + [len(row) for row in labels]), dtype=torch.int32)
    raw, dropped = read_document(tensors, LAYERS)
    outside = sum(not 0 <= chunk < CHUNKS for chunk, _ in flat)
    named = [
        [(chunk, score) for chunk, score in row if 0 <= chunk < CHUNKS and 4 * chunk + 3 <= 27 + token]
        for token, row in enumerate(labels)
    ]
    kept = [  # the first vote for a chunk counts
        [pair for place, pair in enumerate(row) if pair[0] not in [chunk for chunk, _ in row[:place]]] for row in named
    ]
    assert raw.oracle.pointers.tolist() == np.cumsum([0] + [len(row) for row in kept]).tolist()
    found = zip(raw.oracle.chunks.tolist(), raw.oracle.votes.tolist(), strict=True)
    assert list(found) == [pair for row in kept for pair in row]
    assert dropped.out_of_range == outside
    assert dropped.not_visible == len(flat) - outside - sum(map(len, named))
    assert dropped.repeated == sum(map(len, named)) - sum(map(len, kept))


class Payload:
    """Unpickles into a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful(collections.OrderedDict):
    def __reduce__(self):
        return collections.OrderedDict, (), {"x": 1}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Payload(os.system, "true"), r"posix\.system"),
        (Payload(eval, "1"), r"builtins\.eval"),
        (Payload(getattr, "text", "upper"), r"builtins\.getattr"),
        (np.zeros(3), r"numpy\.|_codecs"),
        (torch.nn.Parameter(torch.zeros(2)), r"torch\._utils\._rebuild_parameter"),
        (Stateful(), "sets attributes"),
    ],
)
def test_anything_but_tensors_is_refused_by_name(tmp_path, value, name):
    path = save(tmp_path, 0, dump() | {"extra": value})
    with pytest.raises(InputError, match=f"refused: it .*{name}"):
        load_dump(path)


def test_a_payload_inside_a_storage_is_refused(tmp_path):
    made = tmp_path / "made"
    inner = pickle.dumps(Payload(os.mkdir, str(made)), protocol=2)
    path = save(tmp_path, 0, {"x": Payload(torch.storage._load_from_bytes, inner)})
    with pytest.raises(InputError, match="damaged dump"):
        load_dump(path)
    assert not made.exists()


class Declared:
    """Pickles as a tensor over the storage of `tensor` that says this of itself."""

    def __init__(self, tensor, offset, size, stride, metadata=None):
        self.call = torch._utils._rebuild_tensor_v2, (
            tensor._typed_storage(), offset, size, stride, False, collections.OrderedDict(), metadata
        )  # fmt: skip

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ((0, (20,), (1,)), r"a tensor \[20\] from element 0 on, of 6 that are stored"),
        ((4, (3,), (1,)), r"a tensor \[3\] from element 4 on, of 6"),
        ((-1, (3,), (1,)), "from element -1 on"),
        ((0, (-2, -3), (1, 1)), r"a tensor \[-2, -3\]"),
        ((0, (10**13,), (0,)), r"a tensor \[10000000000000\]"),
        ((0, (6,), (0,)), r"with strides \[0\] is a view"),
        ((0, (3, 2), (1, 3)), r"with strides \[1, 3\] is a view"),
        ((0, (6,), (1,), {"neg": True}), "is a view"),
    ],
)
def test_a_tensor_that_declares_more_than_is_stored_is_damaged(tmp_path, claim, reason):
    """PyTorch would grow the storage and read labels out of whatever lay there."""
    path = save(tmp_path, 0, dump() | {"label_indices": Declared(torch.arange(6, dtype=torch.int32), *claim)})
    with pytest.raises(InputError, match=rf"^damaged dump \(.*{reason}"):
        load_dump(path)


def test_whole_tensors_in_the_middle_of_a_storage_are_read(tmp_path):
    values = torch.arange(24, dtype=torch.int32)
    parts = {"rows": values.view(4, 6)[1:3], "odd": values[4:8].as_strided((1, 4, 1), (7, 1, 9)), "none": values[:0]}
    found = load_dump(save(tmp_path, 0, parts))
    assert all(torch.equal(found[name], value) for name, value in parts.items())


def test_a_storage_that_declares_more_than_it_brings_is_damaged(tmp_path):
    inner = io.BytesIO()
    torch.save(torch.zeros(9)._typed_storage(), inner, _use_new_zipfile_serialization=False)
    head, _ = inner.getvalue().replace(b"K\x09", b"K\xff").split(b"\x80\x02]")  # its size; then what is to be filled
    path = save(tmp_path, 0, {"x": Payload(torch.storage._load_from_bytes, head + pickle.dumps([], protocol=2))})
    with pytest.raises(InputError, match=r"damaged dump .a storage holds more than its bytes"):
        load_dump(path)


def spoil(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


def nan_code(rows):
    rows = rows.clone()
    rows[3, 5] = 0xFF
    return rows


BROKEN = {
    "hidden_layer_12 is missing": lambda tensors: tensors.pop("hidden_layer_12"),
    "label_pointers is missing": lambda tensors: tensors.pop("label_pointers"),
    "hidden_layer_10 is torch.float32": spoil("hidden_layer_10", lambda x: x.float()),
    "hidden_layer_10 is .20, 64., not .20, 4096.": spoil("hidden_layer_10", lambda x: x[:, :64].contiguous()),
    "hidden_layer_12 is .19, 4096., not": spoil("hidden_layer_12", lambda x: x[1:]),
    "hidden_layer_10 holds NaN": spoil("hidden_layer_10", lambda x: x / 0),
    "compk_layer_12: NaN code": spoil("compk_layer_12", nan_code),
    "compk_layer_10 has rows of 128 bytes": spoil("compk_layer_10", lambda x: x[:, :128].contiguous()),
    "compk_layer_12 has another number of chunks": spoil("compk_layer_12", lambda x: x[:-1]),
    "positions_layer_12 differs": spoil("positions_layer_12", lambda x: x + 1),
    "positions_layer_10 does not ascend": spoil("positions_layer_10", lambda x: x.flip(0)),
    "label_pointers has 20 entries for 20": spoil("label_pointers", lambda x: x[1:]),
    "label_pointers does not ascend": spoil("label_pointers", lambda x: x + 1),
    "label_scores and label_indices differ": spoil("label_scores", lambda x: x[1:]),
    "label_scores holds a score that is not 1 to 21": spoil("label_scores", lambda x: x * 0),
    "label_scores holds a score that is not": spoil("label_scores", lambda x: x + 21),
    "positions_layer_10 reaches 1048576, beyond 1048575": lambda tensors: tensors.update(
        {f"positions_layer_{layer}": torch.arange((1 << 20) + 1 - TOKENS, (1 << 20) + 1) for layer in LAYERS}
    ),
    "positions_layer_10 is empty": lambda tensors: tensors.update(
        {f"positions_layer_{layer}": torch.empty(0, dtype=torch.int64) for layer in LAYERS}
    ),
    "compk_layer_10 holds no key": spoil("compk_layer_10", lambda x: x[:0]),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits_layer_10_token_1", lambda x: x[:-1]),
        ("logits_layer_10_token_1", lambda x: torch.cat([x, x[:1]])),
        ("logits_layer_10_token_1", lambda x: x[:0]),
        ("logits_layer_10_token_1", lambda x: x / 0),
        ("logits_layer_10_token_1", lambda x: x.int()),
        ("q_layer_10_token_1", lambda x: x[:, :8100]),
        ("q_layer_10_token_1", lambda x: x.char()),
        ("q_layer_10_token_1", lambda x: x * torch.inf),
        ("weights_layer_10_token_1", lambda x: x * torch.nan),
        ("weights_layer_10_token_1", lambda x: x[:, :0]),
    ],
)
def test_native_rows_that_prove_nothing_are_dropped_and_counted(name, change):
    tensors = dump()
    tensors[name] = change(tensors[name])
    raw, dropped = read_document(tensors, LAYERS)
    assert sorted(raw.native) == [(10, 0), (10, 2)] and dropped == Dropped(native_rows=1)
    assert "native rows dropped: 1" in str(dropped + Dropped())


def test_labels_named_twice_by_a_token_count_once():
    tensors = dump()
    tensors["label_indices"] = torch.tensor([3, 5, 3, 3], dtype=torch.int32)
    tensors["label_scores"] = torch.tensor([4, 5, 9, 6], dtype=torch.int32)
    tensors["label_pointers"] = torch.tensor([0, 3] + [4] * (TOKENS - 1), dtype=torch.int32)
    raw, dropped = read_document(tensors, LAYERS)
    assert dropped == Dropped(repeated=1)
    assert raw.oracle.pointers[:3].tolist() == [0, 2, 3]
    assert raw.oracle.chunks.tolist() == [3, 5, 3] and raw.oracle.votes.tolist() == [4, 5, 6]


def test_odd_descriptions_stop_nothing(tmp_path):
    folder, deep, half = tmp_path / "dumps", "[" * 100_000, "half a pair: \ud83d"
    for number in range(4):
        save(folder, number, dump())
    (folder / "doc_00000.json").write_text(json.dumps({"prompt": half}))
    (folder / "doc_00001.json").write_text(deep)
    (folder / "doc_00002.json").mkdir()
    (folder / "server_metadata.jsonl").write_text(f"{deep}\n" + json.dumps({"filename": "doc_00003.pkl", "x": half}))
    report = imported(folder, tmp_path / "store")
    named = ["server_metadata.jsonl: line 1", "doc_00001.pkl: doc_00001.json", "doc_00002.pkl: doc_00002.json"]
    assert all(name in line for name, line in zip(named, report.failed, strict=True)), report.failed
    first, last = TraceStore.open(tmp_path / "store", partial=True)
    assert first.source["client"]["prompt"] == last.source["server"]["x"] == half
    (folder / "server_metadata.jsonl").unlink()
    (folder / "server_metadata.jsonl").mkdir()
    assert "server_metadata.jsonl: cannot be read" in imported(folder, tmp_path / "again").failed[0]


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "too large for this"), (RuntimeError("no memory\nat all"), "no memory")]
)
def test_a_file_that_torch_gives_up_on_stops_nothing(tmp_path, monkeypatch, error, said):
    def read(tensors, layers):
        if len(tensors["compk_layer_10"]) == CHUNKS:
            raise error
        return read_document(tensors, layers)

    save(tmp_path / "dumps", 0, dump())
    save(tmp_path / "dumps", 1, dump(chunks=CHUNKS + 1))
    monkeypatch.setattr("data_gen.flashmemory.folder.read_document", read)
    report = imported(tmp_path / "dumps", tmp_path / "store")
    assert report.written == 1 and re.fullmatch(f".*doc_00000.pkl: {said}.*", *report.failed)


def test_a_full_disk_stops_the_import(tmp_path, monkeypatch):
    save(tmp_path / "dumps", 0, dump())
    monkeypatch.setattr(TraceStore, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        imported(tmp_path / "dumps", tmp_path / "store")


def test_damaged_files_are_reported_by_name_and_stop_nothing(tmp_path):
    folder, root = tmp_path / "dumps", tmp_path / "store"
    for number, change in enumerate(BROKEN.values()):
        tensors = dump()
        change(tensors)
        save(folder, number, tensors)
    whole = pickle.dumps(dump(), protocol=4)
    bytes_ = {100: whole[: len(whole) // 2], 101: b"", 102: b"garbage" * 9, 103: pickle.dumps([1]), 104: whole[:-1]}
    for number, content in bytes_.items():
        (folder / f"doc_{number:05d}.pkl").write_bytes(content)
    save(folder, 200, {name: value for name, value in dump().items()} | {"note": "text"})
    save(folder, 201, dump())
    (folder / "doc_00201.json").write_text("{")
    (folder / "doc_7.pkl").write_bytes(whole)  # would be number 7, as doc_00007.pkl is
    (folder / "doc_00202.pkl").mkdir()
    (folder / "server_metadata.jsonl").write_text('{"filename": "doc_00300.pkl"}\nnonsense\n')
    save(folder, 300, dump())
    report = imported(folder, root)
    assert report.written == 1 and [p.name for p in TraceStore.open(root, partial=True).paths()] == [
        "doc_0000300.safetensors"
    ]
    reasons = [f"doc_{number:05d}.pkl: {reason}" for number, reason in enumerate(BROKEN)]
    reasons = ["doc_7.pkl: not named like a dump", "server_metadata.jsonl: line 2", *reasons,
               "doc_00100.pkl: damaged", "doc_00101.pkl: damaged",
               "doc_00102.pkl: damaged", "doc_00103.pkl: not a dump", "doc_00104.pkl: damaged",
               "doc_00200.pkl: not a dump .note is no tensor", "doc_00201.pkl: doc_00201.json is not JSON",
               "doc_00202.pkl: cannot be read .Is a directory"]  # fmt: skip
    assert len(report.failed) == len(reasons)
    assert all("\n" not in line for line in report.failed)
    for found, reason in zip(report.failed, reasons, strict=True):
        assert re.search(reason, found), (found, reason)
    assert not list(root.glob(".unfinished*"))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99, 1])
def test_a_dump_cut_anywhere_is_damaged_or_whole(tmp_path, share):
    whole = pickle.dumps(dump(), protocol=4)
    path = tmp_path / "doc_00000.pkl"
    path.write_bytes(whole[: int(share * len(whole))])
    if share == 1:
        assert set(load_dump(path)) == set(dump())
        return
    with pytest.raises(InputError, match=r"^damaged dump \(.+\)$"):
        load_dump(path)


@pytest.mark.parametrize("protocol", [3, 5])
def test_other_pickle_protocols_are_read_too(tmp_path, protocol):
    path = tmp_path / "doc_00000.pkl"
    path.write_bytes(pickle.dumps(dump(), protocol=protocol))
    found = load_dump(path)
    assert all(torch.equal(found[name], value) for name, value in dump().items())


def test_dumps_without_labels_or_with_the_keys_of_the_prompt_only(tmp_path):
    """The server writes the prompt's keys first; what the answer completed has logits and labels, but no key."""
    tensors = dump()
    for name in ("label_indices", "label_scores"):
        tensors[name] = tensors[name][:0]
    tensors["label_pointers"] = torch.zeros(TOKENS + 1, dtype=torch.int32)
    raw, dropped = read_document(tensors, LAYERS)
    assert not len(raw.oracle.chunks) and dropped.out_of_range == dropped.not_visible == 0
    tensors = dump(chunks=6)
    tensors["label_indices"][0], tensors["label_indices"][1:] = 6, 5
    raw, dropped = read_document(tensors, LAYERS)
    assert dropped.out_of_range == 1 and set(raw.oracle.chunks.tolist()) == {5}
    assert len(raw.native[10, 0].logits) == 7 and len(raw.keys[10]) == 6


def test_settings_that_do_not_fit_dumps_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        imported(tmp_path / "nowhere", tmp_path / "store")
    with pytest.raises(InputError, match="no dump there"):
        imported(tmp_path, tmp_path / "store")
    save(tmp_path, 0, dump())
    with pytest.raises(InputError, match="oracle `indexer`"):
        imported(tmp_path, tmp_path / "store", TRACE.model_copy(update={"oracle": "attention"}))
    with pytest.raises(InputError, match=r"\[21\] are not among the 21"):
        imported(tmp_path, tmp_path / "store", TRACE.model_copy(update={"layers": [10, 21]}))
    assert not (tmp_path / "store").exists()


def test_an_indexer_trains_and_is_measured_on_imported_traces(tmp_path):
    folder = tmp_path / "dumps"
    for number in range(4):
        save(folder, number, dump(seed=number))
    imported(folder, tmp_path / "store")
    store = TraceStore.open(tmp_path / "store")
    shape = IndexerConfig(heads=2, rank=4)
    config = TrainConfig(loss="focal", epochs=1, windows_per_document=4, validation_every=2, eval_epochs=1)
    indexer = train(store, shape, config, tmp_path / "run")
    threshold, note = threshold_for("indexer", indexer, 0.1)
    assert note is None
    rows = evaluate_recall(indexer, store, config.golden, threshold.cuts[0].score)
    untrained = {"oracle", "native_votes", "frequency", "recency", "random", "protected"}
    assert {row.policy for row in rows} == untrained | {"indexer", "layer 10", "layer 12"}
    full = [row.mass_recall for row in rows if row.policy == "oracle" and row.budget == 0.2]
    assert full and 0 < full[0] <= 1


def test_the_command_reports_and_exits_as_asked(tmp_path, tiny_recipe):
    recipe = tiny_recipe.model_copy(update={"trace": TRACE})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    save(tmp_path / "dumps", 0, dump())
    (tmp_path / "dumps" / "doc_00001.pkl").write_bytes(b"")
    call = ["import", str(tmp_path / "recipe.yaml"), "--dumps", str(tmp_path / "dumps"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0
    assert "1 documents imported, 0 were there, 1 files failed; labels dropped: 0 of" in result.stdout
    assert "doc_00001.pkl: damaged dump" in result.stderr
    assert CliRunner().invoke(app, [*call, "--strict"]).exit_code == 1
    (tmp_path / "dumps" / "doc_00000.pkl").unlink()
    assert CliRunner().invoke(app, [*call[:-1], str(tmp_path / "other")]).exit_code == 1
