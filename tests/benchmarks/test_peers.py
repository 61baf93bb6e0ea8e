"""Readings, shares, choices and rows; the whole of it where KVPRESS_PYTHON names an interpreter with kvpress."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.peers import PEERS, plan, settings
from benchmarks.peers_examples import asked, kept_share, readings, weights
from benchmarks.peers_journal import AnswerFile
from benchmarks.peers_ours import CORRECTED, LEFT, OURS, followed, kept
from benchmarks.peers_rows import answers, best, described, everywhere, rows, tables
from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from eval.online.config import BenchmarkConfig
from eval.online.generated import Haystack, generate_examples
from eval.online.session import DenseSession
from indexer_train.formats.bundle import export_bundle
from tests.eval.conftest import indexer  # noqa: F401 - a fixture
from tests.eval.online.test_benchmark import tiny_backbone, trained  # noqa: F401 - one is a fixture

CONFIG = BenchmarkConfig(tasks=["single", "multi_key"], examples=2, texts=1)


@pytest.fixture(scope="module")
def examples(tokenizer):
    haystack = Haystack("builtin", "text", 0.5, tokenizer, 700)
    built = generate_examples(CONFIG, [700], haystack, tokenizer, False)
    return [build() for name, build in built.items() if not name.startswith("mrcr")]


@pytest.fixture
def read(examples, tokenizer):
    return [{each["reading"]: each for each in readings(example, CONFIG, tokenizer, False)} for example in examples]


def test_every_reading_is_the_same_question(examples, read, tokenizer):
    for example, found in zip(examples, read, strict=True):
        whole = [*example.prompt(tokenizer, False), *example.opening(tokenizer)]
        text, _, question = example.messages[0]["content"].rpartition("\n\n")
        for reading in ("known", "unknown"):
            assert found[reading]["prompt"] + found[reading]["given"] == whole
        known, unknown = found["known"], found["unknown"]
        assert tokenizer.decode(unknown["prompt"]).endswith(f"{text}\n") and not unknown["question"]
        asked = tokenizer.decode(known["prompt"][-known["question"] :])
        assert asked.startswith(question) and text[-10:] not in asked
        (place,) = unknown["again"]
        assert unknown["given"][: place + 1][-1] == known["given"][0] and known["again"] == []
        assert set(found) == {"known", "unknown", *(["second"] if example.task == "multi_key" else [])}


def test_the_second_question_asks_for_another_needle_of_the_same_document(examples, read, tokenizer):
    for example, found in zip(examples, read, strict=True):
        if example.task == "multi_key":
            later, first = found["second"], found["known"]
            (value,) = later["references"]
            text = tokenizer.decode(later["given"])
            assert later["prompt"] == first["prompt"] and value not in first["references"]
            assert first["references"][0] in text and value not in text
            assert f"{text.rpartition('<assistant>')[2]} {value}." in example.messages[0]["content"]
            assert later["given"][later["again"][0]] == example.prompt(tokenizer, False)[-1]


def test_texts_come_first_and_second_questions_have_a_number_of_their_own(tmp_path, tokenizer, trained, tiny_recipe):  # noqa: F811
    export_bundle(trained, tmp_path / "bundle")
    config, model = CONFIG.model_copy(update={"text_tokens": 40, "texts": 3}), tiny_backbone().model
    found = asked(tiny_recipe, tmp_path / "bundle", model, tokenizer, [480], config, seconds=3)
    names = [each["name"].replace("-480-000", " ") for each in found]
    assert names[:4] == ["text 0 text", "text 0 speed", "text 1 text", "text 2 text"]  # more than questions: all three
    for place, task in [(4, "single 0"), (11, "single 1")]:
        assert names[place : place + 2] == [f"{task} known", f"{task} unknown"]
    assert sum(name.endswith("known") for name in names) == 2 * 2 * 3  # two readings, two examples, three tasks
    assert [name for name in names if name.endswith("second")] == [f"multi_key {index} second" for index in range(3)]
    assert names[-1] == "multi_key 2 second"


@pytest.mark.parametrize("tokens", [9, 100, 703])
def test_the_share_is_what_a_session_keeps(tokens):
    chunking = Chunking(tokens=4, sink=1, recent=2)
    session = DenseSession(tiny_backbone().model, chunking)
    session.read([token % 100 for token in range(tokens)])
    session.host.keep(session.best(torch.rand(chunking.visible(tokens - 1)), 0.2).resident)
    assert session.resident_tokens / tokens == pytest.approx(kept_share(chunking, 0.2, tokens))


def test_ours_reads_what_is_given_and_answers_greedily(read, indexer):  # noqa: F811 - the fixture of that name
    asked, model = read[0]["unknown"] | {"stop": [3], "most": 6}, tiny_backbone().model
    session = DenseSession(model, indexer.spec.chunking)
    session.read(asked["prompt"])
    names = ["full, here", "indexer", CORRECTED, "recency"]
    found = followed(asked, session, {name: kept(OURS[name], indexer, 0.1, 2) for name in names}, indexer)
    ids = asked["prompt"] + asked["given"]
    for token in found["full, here"]["said"]:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    tokens = len(asked["prompt"])
    share = (kept_share(indexer.spec.chunking, 0.1, tokens) * tokens + 1) / (tokens + 1)
    for name in names[1:]:
        assert found[name]["kept"] == pytest.approx(share)
    assert found["indexer"]["moved"] > 0 and found["recency"]["moved"] == 0
    assert found[CORRECTED]["index"] > found["indexer"]["index"] > found["recency"]["index"] == 0
    assert found["full, here"]["moved"] == 0


def test_settings_that_need_the_question_are_for_readings_that_know_it():
    known, unknown = (settings(reading, PEERS, None) for reading in ("known", "unknown"))
    assert "ChunkKV(SnapKV)/1" in known and "ChunkKV(SnapKV)/1" not in unknown
    chosen = settings("known", ["full", "SnapKV", "TOVA"], {"known": {"SnapKV": 2, "TOVA": 0}})
    assert list(chosen) == ["full/0", "SnapKV/0", "SnapKV/2", "TOVA/0"]
    assert described(PEERS["ChunkKV(SnapKV)"][2]) == "ChunkKV(SnapKV window_size question) chunk_length 10"


PAIR = {"a": [{"class": "a"}, {"class": "a", "size": 2}, {"class": "a", "size": 3}]}


def folder(root, part, tokenizer, said, failing=()):
    """Answers of methods to two questions: said[method] are the texts; `failing` methods raised."""
    tokenizer.save_pretrained(root / "weights")
    asked = [{"name": str(n), "reading": "known", "most": 9, "references": ["7"]} for n in range(2)]
    (root / part).mkdir(parents=True)
    (root / part / "plan.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    figures = {"kept": 0.2, "bytes": 2e6, "index": 0, "moved": 1e6, "seconds": 0.01}
    with (root / part / "answers-x.jsonl").open("w") as file:
        for method, texts in said.items():
            for n, text in enumerate(texts):
                told = {"failed": "no"} if method in failing else {"said": tokenizer(text).input_ids, **figures}
                file.write(json.dumps({"name": str(n), "method": method, "origin": {}} | told) + "\n")


def test_the_best_setting_is_chosen_and_rows_say_who_wins(tmp_path, tokenizer):
    wrong, right = ["1", "2"], ["7", "17"]
    said = {"a/0": wrong, "a/1": ["7", "2"], "a/2": right}
    folder(tmp_path, "development", tokenizer, said, failing=("a/2",))
    assert best(tmp_path / "development", PAIR) == {"known": {"a": 1}}
    (tmp_path / "chosen.json").write_text('{"known": {"a": 1}, "unknown": {}, "second": {}, "text": {}}')
    (tmp_path / "command").write_text("python -m benchmarks.peers")
    ours = {"full, here": right, "indexer": ["3", "4"], "recency": wrong}
    folder(tmp_path, "report", tokenizer, ours | {"a/0": wrong, "a/1": right})
    folder(tmp_path, "speed", tokenizer, {})
    made = rows(tmp_path, PAIR, OURS)
    assert made["origins"] == [{"command": "python -m benchmarks.peers"}]
    found = made["rows"]
    assert [(row["method"], row.get("shipped")) for row in found] == [
        ("full, here", None), ("indexer", None), ("recency", None), ("a", True), ("a", False)
    ]  # fmt: skip
    assert found[-1]["score"][0] == 1 and found[-1]["lead"] == [-1, -1, -1] and found[-1]["same_as_full"] == 2
    line = next(line for line in tables(found).splitlines() if "a size 2" in line)
    assert "1.000 [" in line and "yes" in line and "-1.000" in line
    assert "| a " in tables(found).splitlines()[-1] and "0.000, **1.000**" in tables(found).splitlines()[-1]
    told = tables(found, {"b": "no time"}).splitlines()
    assert any("| b " in line and "not asked: no time" in line for line in told) and "not asked" in told[-1]


def test_missing_answers_and_other_questions_are_refused(tmp_path, tokenizer):
    folder(tmp_path, "report", tokenizer, {"a/0": ["1"]})
    with pytest.raises(InputError, match="a/0 has not answered every question"):
        answers(tmp_path / "report")
    plan(tmp_path / "new", [{"name": "x", "reading": "known"}], ["TOVA"], None)
    plan(tmp_path / "new", [{"name": "x", "reading": "known"}], ["TOVA"], None)
    with pytest.raises(InputError, match="something else was asked"):
        plan(tmp_path / "new", [{"name": "y", "reading": "known"}], ["TOVA"], None)


def test_so_far_counts_what_every_method_has_answered(tmp_path, tokenizer):
    right, wrong = ["7", "17"], ["1", "2"]
    said = {"full, here": right, "indexer": ["7"], "recency": wrong, "a/0": wrong, "a/1": right}
    folder(tmp_path, "report", tokenizer, said)
    (tmp_path / "chosen.json").write_text('{"known": {"a": 1}, "unknown": {}, "second": {}, "text": {}}')
    (tmp_path / "command").write_text("python -m benchmarks.peers")
    with pytest.raises(InputError, match="indexer has not answered every question"):
        rows(tmp_path, PAIR, OURS)
    found = rows(tmp_path, PAIR, OURS, so_far=True)["rows"]
    assert {row["examples"] for row in found} == {1} and len(found) == len(said)
    assert not any("seconds" in row for row in found)
    assert everywhere({"a/0": {"x": {}}}) == {} and everywhere({"a/0": {"x": {}}, "indexer": {"y": {}}}) == {}


def test_nothing_to_print_so_far_is_said(tmp_path, tokenizer):
    folder(tmp_path, "report", tokenizer, {"a/0": ["1"]})
    with pytest.raises(InputError, match="nothing yet"):
        answers(tmp_path / "report", so_far=True)


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    path = tmp_path / "answers-x.jsonl"
    AnswerFile(path).add("1", "a", {"said": []})
    path.write_bytes(path.read_bytes() + b'{"name": "2", "meth')
    again = AnswerFile(path)
    assert again.done == {("1", "a")}
    again.add("2", "a", {"said": [5]})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["1", "2"]


def test_weights_are_written_once(tmp_path, tiny_recipe):
    recipe = tiny_recipe.model_copy(update={"backbone": tiny_recipe.backbone.model_copy(update={"path": "tiny"})})
    model, _ = weights(recipe, tmp_path / "weights")
    written = (tmp_path / "weights" / "model.safetensors").stat().st_mtime_ns
    again, _ = weights(recipe, tmp_path / "weights")
    assert (tmp_path / "weights" / "model.safetensors").stat().st_mtime_ns == written
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.skipif("KVPRESS_PYTHON" not in os.environ, reason="KVPRESS_PYTHON: an interpreter with kvpress")
def test_both_environments_answer_the_same_questions(tmp_path):
    lookahead = [sys.executable, "-m", "cli", "run", "debug", "--out", str(tmp_path / "debug")]
    subprocess.run(lookahead, check=True)
    command = [sys.executable, "-m", "benchmarks.peers", "debug", "--bundle", str(tmp_path / "debug" / "bundle")]
    command += ["--kvpress", os.environ["KVPRESS_PYTHON"], "--out", str(tmp_path / "out"), "--follow", "32"]
    subprocess.run([*command, "--examples", "1", "--texts", "1", "--development", "1"], check=True)
    found = json.loads((tmp_path / "out" / "peers.json").read_text())["rows"]
    by_name = {(row["reading"], row["method"]): row for row in found}
    for reading in ("known", "unknown", "second"):
        assert by_name[reading, "full"]["same_as_full"] == by_name[reading, "full"]["examples"]
        answered = {row["method"] for row in found if row["reading"] == reading}
        assert answered >= {*PEERS, *OURS} - {LEFT, CORRECTED}
    assert all("kept" in row or "why" in row for row in found)
