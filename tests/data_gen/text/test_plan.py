"""The plan: what it freezes, what it notices, and that it does not hold what it writes."""

import json
import resource
import threading
import tracemalloc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen.config import DocumentsConfig
from data_gen.core.errors import InputError
from data_gen.text import plan as planning
from data_gen.text.documents import draw_documents, source_hash
from data_gen.text.plan import Plan, open_plan
from data_gen.text.seen import Seen
from data_gen.text.sources import raw_digest
from data_gen.traces.progress import PLAN

LIMITS = (512, 128)


@pytest.fixture
def planned(tiny_recipe, tokenizer):
    """(folder, changes of `documents`) -> a plan opened there."""

    def call(out, **changes):
        documents = tiny_recipe.documents.model_copy(update=changes)
        return open_plan(out, documents, tiny_recipe.trace, tokenizer, LIMITS)

    return call


def test_what_is_read_from_it_is_what_would_be_drawn(planned, tiny_recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "GROUP_DOCUMENTS", 3)
    plan = planned(tmp_path)
    for side in ("train", "heldout"):
        drawn = list(draw_documents(tiny_recipe.documents, tiny_recipe.trace, tokenizer, LIMITS[0], side))
        assert list(plan.documents(side)) == drawn
        assert [plan.document(side, number) for number in (3, 1)] == [drawn[3], drawn[1]]
        assert plan.content(side) == {n: (each.name, each.digest) for n, each in enumerate(drawn)}
        assert [row["length"] for row in plan.brief[side]] == [len(each.tokens) for each in drawn]
        assert [row["rows"] for row in plan.brief[side]] == [len(each.positions) for each in drawn]
    columns = {"document", "side", "task", "seed", "source_position", "content_hash", "length"}
    table = pq.read_table(tmp_path / PLAN)
    assert columns <= set(table.column_names) and table.num_rows == 12
    assert table["seed"][0].as_py() == "0 train-text-0000" and pq.ParquetFile(tmp_path / PLAN).num_row_groups == 4


def test_two_plans_have_the_same_bytes_and_names_sort_as_numbers(planned, tmp_path):
    planned(tmp_path / "a")
    planned(tmp_path / "b")
    assert (tmp_path / "a" / PLAN).read_bytes() == (tmp_path / "b" / PLAN).read_bytes()
    names = [row["document"] for row in planned(tmp_path / "a").brief["train"]]
    assert sorted(names)[0] == "train-single-0000000" and len({len(name) for name in names if "text" in name}) == 1


def test_other_settings_make_another_plan_until_something_is_traced(planned, tmp_path):
    first = planned(tmp_path).settings
    assert planned(tmp_path, seed=1).settings != first
    (tmp_path / "train" / "0000").mkdir(parents=True)
    (tmp_path / "train" / "0000" / "doc_0000000.safetensors").touch()
    with pytest.raises(InputError, match="holds traces made with another documents; choose another folder"):
        planned(tmp_path, seed=2)


def test_another_tokenizer_is_another_plan(planned, tiny_recipe, tokenizer, tmp_path):
    first = planned(tmp_path).settings
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="\x03", unk_token="?")
    assert open_plan(tmp_path, tiny_recipe.documents, tiny_recipe.trace, other, LIMITS).settings != first
    tokenizer("a", truncation=True, max_length=1)  # leaves traces of its own
    assert planned(tmp_path).settings == first


def test_one_process_plans_and_the_others_wait(planned, tmp_path, monkeypatch):
    written, write = [], planning._write
    monkeypatch.setattr(planning, "_write", lambda *of: written.append(of) or write(*of))
    threads = [threading.Thread(target=planned, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and [path.name for path in tmp_path.iterdir()] == [PLAN]


@pytest.mark.parametrize("where", [0.02, 0.5, 0.9])
def test_a_damaged_plan_is_named(planned, tmp_path, where):
    planned(tmp_path)
    path = tmp_path / PLAN
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{PLAN}: damaged plan \(.*\); delete it"):
        for side in ("train", "heldout"):
            list(Plan(path).documents(side))
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=rf"{PLAN}: damaged plan"):
        planned(tmp_path)


def test_documents_are_written_as_they_are_drawn(planned, tmp_path, monkeypatch):
    """The tokens of two groups of rows are alive at most, the one that is written and the next one."""

    class Tokens(list):
        """Of a document: whether it is alive can be asked."""

    drawn, most = [], 0

    def watched(*of):
        nonlocal most
        for document in draw_documents(*of):
            tokens = Tokens(document.tokens)
            drawn.append(weakref.ref(tokens))
            most = max(most, sum(each() is not None for each in drawn))
            yield replace(document, tokens=tokens)

    monkeypatch.setattr(planning, "GROUP_DOCUMENTS", 4)
    monkeypatch.setattr(planning, "draw_documents", watched)
    planned(tmp_path, train={"text": 20})
    assert len(drawn) == 24 and most <= 2 * 4 + 1


def test_chats_and_texts_say_where_they_are_from(tiny_recipe, tokenizer, tmp_path):
    source = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Is it? " * 20}, {"role": "assistant", "content": "It is. " * 9}]
    rows = [{"messages": [chat[0] | {"content": f"{n} " + chat[0]["content"]}, chat[1]]} for n in range(30)]
    source.write_text("\n".join(map(json.dumps, rows)))
    asked = {"source": str(source), "train": {"chat": 5}, "heldout": {"chat": 2}, "heldout_share": 0.4}
    documents = tiny_recipe.documents.model_copy(update=asked)
    plan = open_plan(tmp_path, documents, tiny_recipe.trace, tokenizer, LIMITS)
    for side in ("train", "heldout"):
        for document in plan.documents(side):
            (number,) = document.sources
            assert tokenizer.decode(document.tokens).startswith(f"<user>{number} Is it?")
    plan.check_source(documents)


def write_plan(path, positions, texts):
    """A plan as `check_source` reads it: of the documents whose texts have these numbers."""
    hashes = [source_hash(raw_digest(texts[number]) for number in own) for own in positions]
    found = enumerate(zip(positions, hashes, strict=True))
    rows = [{"document": f"doc {n}", "source_position": own, "source_hash": hashed} for n, (own, hashed) in found]
    schema = pa.schema([planning.SCHEMA.field(name) for name in rows[0]])
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for first in range(0, len(rows), 3):
            writer.write_table(pa.Table.from_pylist(rows[first : first + 3], schema))
        writer.add_key_value_metadata({"settings": "{}", "notes": "[]"})


def write_texts(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DocumentsConfig(source=str(path), tokens=(1, 1), train={"text": 1}, heldout={"text": 1})


@given(st.data())
def test_the_first_document_whose_texts_changed_is_named(tmp_path_factory, data):
    """Texts that no document has may change, and the source may end before them."""
    folder = tmp_path_factory.mktemp("plan")
    texts = data.draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12))
    own = st.lists(st.integers(0, len(texts) - 1), unique=True, max_size=5)
    positions = data.draw(st.lists(own, min_size=1, max_size=8))
    now = [data.draw(st.sampled_from([text, text, text, "e"])) for text in texts]
    now = now[: data.draw(st.integers(1, len(now)))]
    write_plan(folder / PLAN, positions, texts)
    changed = [n for n, own in enumerate(positions) if [texts[i] for i in own] != [now[i] for i in own if i < len(now)]]
    with pytest.raises(InputError, match=f": doc {changed[0]} was made") if changed else nullcontext():
        Plan(folder / PLAN).check_source(write_texts(folder / "source.jsonl", now))


def test_comparing_a_source_holds_a_few_bytes_of_each_text(tmp_path):
    held = []
    for count in (10_000, 30_000):
        texts = [str(number) for number in range(count)]
        write_plan(tmp_path / PLAN, [list(range(first, first + 50)) for first in range(0, count, 50)], texts)
        documents = write_texts(tmp_path / "source.jsonl", texts)
        tracemalloc.start()
        Plan(tmp_path / PLAN).check_source(documents)
        held.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert held[1] - held[0] < 64 * 20_000  # a position of 8 bytes, a digest of 32, and what sorting takes


def test_seen_is_a_set():
    seen = Seen()
    assert seen.add("a") and seen.add("b") and not seen.add("a") and "b" in seen and "c" not in seen


def test_a_set_that_its_disk_cannot_hold_names_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SQLITE_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    try:
        with pytest.raises(
            InputError, match=rf"^{tmp_path}: the hashes .* \(.+\); make room there, or set SQLITE_TMPDIR"
        ):
            seen = Seen()
            for number in range(1 << 20):  # what SQLite keeps in memory comes first
                seen.add(str(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
