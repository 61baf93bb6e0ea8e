"""The whole benchmark on a tiny model: resumed, extended, refused."""

import pytest

from data_gen.backbones.dense import DenseBackbone
from data_gen.core.errors import InputError
from eval.online.benchmark import _lengths, benchmark
from eval.online.config import BenchmarkConfig
from indexer_train.model import MemoryIndexer
from indexer_train.spec import Provenance, Source
from tests.conftest import tiny_model
from tests.eval.online.test_formats import RULER, write

CONFIG = BenchmarkConfig(examples=2, texts=1, text_tokens=40, common=1, values=1, policies=["indexer", "recency"])


def tiny_backbone(context=1200):
    model = tiny_model("llama")
    model.config.max_position_embeddings = context
    return DenseBackbone(model)


@pytest.fixture(scope="module")
def trained(indexer, tiny_recipe):
    """An indexer that says what documents trained it."""
    twin = MemoryIndexer.from_spec(indexer.spec.model_copy(), device="cpu")
    twin.query_encoder.load_state_dict(indexer.query_encoder.state_dict())
    documents = tiny_recipe.documents.model_dump(mode="json") | {"split": "train", "heldout": {"text": 2, "single": 2}}
    twin.spec.provenance = Provenance(
        backbone="llama",
        oracle="attention",
        sources=[Source(documents=documents, training=8)],
        validation=0,
        train={},
    )
    return twin


def ask(trained, tokenizer, out, config=CONFIG, progress=lambda names, _: names, **changes):
    return benchmark(tiny_backbone(), tokenizer, trained, config.model_copy(update=changes), out, progress)


@pytest.fixture(scope="module")
def finished(trained, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    return out, *ask(trained, tokenizer, out)


def test_every_task_has_every_policy_within_and_beyond_the_training_lengths(finished):
    _, sections, notes = finished
    rows = sections["benchmark"]
    tasks = {"single", "multi_key", "multi_value", "multi_query", "variable_tracking", "aggregation", "mrcr"}
    assert {(row.task, row.length) for row in rows} == {(task, n) for task in tasks for n in (500, 1000)}
    assert {row.policy for row in rows} == {"full", "indexer", "recency"}
    for row in rows:
        assert row.examples == 2 and 0 <= row.low <= row.accuracy <= row.high <= 1
        assert (row.beyond > 1.5) == (row.length == 1000)
        assert row.kept == 1 if row.policy == "full" else row.kept < 0.5
    text = sections["benchmark_text"]
    assert [row.length for row in text] == [500] * 3 + [1000] * 3 and text[0].agreement == 1
    assert {row.policy for row in sections["benchmark_depth"]} == {"full", "indexer", "recency"}
    assert notes == []


def test_a_killed_run_continues_and_gives_the_same(finished, trained, tokenizer, tmp_path, monkeypatch):
    def killed(names, _):
        yield from list(names)[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(trained, tokenizer, tmp_path, progress=killed)
    whole = (finished[0] / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "answers.jsonl").read_bytes() == b"".join(whole[:6])
    with open(tmp_path / "answers.jsonl", "ab") as file:
        file.write(b"".join(whole[6:-8]) + b'{"name": "half')  # as if it had been killed later
    asked = []
    sections, _ = ask(trained, tokenizer, tmp_path, progress=lambda names, _: asked.extend(names) or names)
    assert sections == finished[1]
    assert len(whole) == 1 + 30 and len(asked) == 8  # 7 tasks x 2 and 1 text, at 2 lengths
    read = (tmp_path / "answers.jsonl").read_bytes()
    assert read == (finished[0] / "answers.jsonl").read_bytes()
    again, _ = ask(trained, tokenizer, tmp_path, progress=lambda names, _: [] if not names else 1 / 0)
    assert again == sections and (tmp_path / "answers.jsonl").read_bytes() == read


def test_a_finished_run_can_be_extended_but_not_mixed(finished, trained, tokenizer):
    out = finished[0]
    asked = []
    path = write(out / "niah_single_1" / "validation.jsonl", RULER, RULER | {"input": "word " * 400})
    files = [{"format": "ruler", "source": str(path)}]
    config = BenchmarkConfig.model_validate(CONFIG.model_dump() | {"files": files, "examples": 1})
    sections, notes = ask(trained, tokenizer, out, config, lambda names, _: asked.extend(names) or names)
    assert len(asked) == 2 and all(name.startswith("ruler") for name in asked)
    rows = [row for row in sections["benchmark"] if row.benchmark == "ruler"]
    assert [(row.task, row.examples, row.left_out) for row in rows] == [("niah_single_1", 1, 1)] * 3
    assert notes == ["left out: 1 of ruler niah_single_1: longer than the backbone's context (1200 tokens)"]
    with pytest.raises(InputError, match=r"other settings \(budgets\)"):
        ask(trained, tokenizer, out, budgets=[0.2])
    with pytest.raises(InputError, match=r"other settings \(text\)"):
        ask(trained, tokenizer, out, lengths=[600])


def test_policies_that_the_backbone_lacks_are_named(trained, tokenizer, tmp_path):
    config = CONFIG.model_copy(update={"policies": ["native", "indexer"], "tasks": [], "lengths": [500], "examples": 1})
    sections, notes = ask(trained, tokenizer, tmp_path, config)
    found = [(row.task, row.length, row.policy) for row in sections["benchmark"]]  # mrcr, and beyond training
    assert found == [("mrcr", length, policy) for length in (500, 1000) for policy in ("full", "indexer")]
    assert notes == ["not run: native (this backbone or bundle has none)"]


def test_what_cannot_be_asked_is_refused_first(trained, indexer, tokenizer, tmp_path):
    def refused(message, who=trained, backbone=None, **changes):
        with pytest.raises(InputError, match=message):
            benchmark(backbone or tiny_backbone(), tokenizer, who, CONFIG.model_copy(update=changes), tmp_path, None)
        assert not (tmp_path / "answers.jsonl").exists()

    refused("lengths: 2000, but the backbone's context is 1200", lengths=[2000])
    refused("fingerprint", backbone=DenseBackbone(tiny_model("qwen3")))
    refused("which lengths it was trained on; give lengths", who=indexer)
    refused("text its training held out", who=indexer, lengths=[500])
    refused("no such file", haystack=str(tmp_path / "gone.txt"))
    whole = trained.spec.provenance.sources[0].documents | {"train": {"document": 8}, "heldout": {"document": 2}}
    twin = MemoryIndexer.from_spec(trained.spec.model_copy(deep=True), device="cpu")
    twin.spec.provenance.sources[0].documents = whole
    refused("text its training held out", who=twin)


def test_files_alone_need_no_text_and_no_lengths(indexer, tokenizer, tmp_path):
    path = write(tmp_path / "niah_single_1.jsonl", RULER)
    config = CONFIG.changed([f"ruler={path}"], budgets=[0.3])
    assert config.tasks == ["mrcr"] and config.budgets == [0.3]
    assert CONFIG.changed([f"ruler={path}"], tasks=["text"]).tasks == ["text"]
    sections, (note,) = ask(indexer, tokenizer, tmp_path / "out", config)
    assert {(row.benchmark, row.task, row.examples) for row in sections["benchmark"]} == {("ruler", "niah_single_1", 1)}
    assert note.startswith("mrcr not asked: the bundle does not say which lengths")
    alone = config.model_copy(update={"tasks": []}).changed([])  # as a recipe says it
    assert alone.tasks == [] and alone.changed([f"ruler={path}"]).tasks == []
    again, notes = ask(indexer, tokenizer, tmp_path / "out", alone)
    assert again == sections and notes == ["mrcr not asked: files only (tasks: [])"]
    with pytest.raises(InputError, match="text its training held out"):  # asked for in so many words
        ask(indexer, tokenizer, tmp_path / "other", config.model_copy(update={"lengths": [500]}))


def test_files_are_asked_with_dense_demand_beyond_training(trained, tokenizer, tmp_path):
    path = write(tmp_path / "niah_single_1.jsonl", RULER)
    config = CONFIG.changed([f"ruler={path}"], examples=1).model_copy(update={"policies": ["protected"]})
    sections, notes = ask(trained, tokenizer, tmp_path / "out", config)
    rows = sections["benchmark"]
    assert [(r.task, r.length) for r in rows if r.policy == "full"] == [
        ("mrcr", 500), ("mrcr", 1000), ("niah_single_1", rows[-1].length)
    ]  # fmt: skip
    kept = {row.policy: row.chunks for row in rows}
    assert kept["protected"] < 0.2 * kept["full"] and notes == []


@pytest.mark.parametrize(
    ("given", "context", "lengths", "note"),
    [
        (None, 900, [500, 900], "beyond training only 900 tokens"),
        ([400], 1200, [400, 1000], None),
        ([400, 600], 1200, [400, 600], None),
        ([400], 500, [400], "no length beyond training"),
    ],
)
def test_a_length_beyond_training_is_asked_where_there_is_room(given, context, lengths, note):
    found, notes = _lengths(CONFIG.model_copy(update={"lengths": given}), 500, context)
    assert found == lengths and [each[: len(note)] for each in notes] == ([note] if note else [])


def test_unseen_text_may_be_named(indexer, tokenizer, tmp_path):
    source = tmp_path / "essay.md"
    source.write_text("\n\n".join(f"Paragraph {n} tells of a river that bends {n} times." for n in range(60)))
    config = CONFIG.model_copy(update={"haystack": str(tmp_path), "tasks": ["single"], "lengths": [500], "examples": 1})
    sections, _ = ask(indexer, tokenizer, tmp_path / "out", config)
    assert {row.task for row in sections["benchmark"]} == {"single", "mrcr"}
    assert sections["benchmark"][0].beyond is None


def test_a_bad_row_of_named_text_stops_or_is_counted_as_in_training_or_as_a_recipe_says(trained, tokenizer, tmp_path):
    rows = [{"text": f"Paragraph {n} tells of a river that bends {n} times."} for n in range(60)]
    source = write(tmp_path / "rows.jsonl", {"te": "no text"}, *rows)
    config = CONFIG.model_copy(update={"haystack": str(source), "tasks": ["mrcr"], "lengths": [500], "examples": 1})
    with pytest.raises(InputError, match=r"rows\.jsonl line 1: needs a text field"):
        ask(trained, tokenizer, tmp_path / "stopped", config)
    skips = MemoryIndexer.from_spec(trained.spec.model_copy(deep=True), device="cpu")
    skips.query_encoder.load_state_dict(trained.query_encoder.state_dict())
    skips.spec.provenance.sources[0].documents["bad_rows"] = "skip"
    _, notes = ask(skips, tokenizer, tmp_path / "out", config)
    assert any("haystack: 1 bad rows skipped: " in note and "rows.jsonl line 1" in note for note in notes)
    given = tiny_backbone(), tokenizer, trained, config, tmp_path / "out", lambda names, _: names
    assert benchmark(*given, bad_rows="skip")[1] == notes
    with pytest.raises(InputError, match=r"rows\.jsonl line 1: needs a text field"):
        benchmark(*given[:2], skips, config, tmp_path / "stopped", given[-1], bad_rows="stop")
