"""Readers of kvpress's, SCBench's, BABILong's, GraphWalks' and HELMET's files, and both ends of two of them."""

import json
from dataclasses import replace

import pytest
import torch

from data_gen.core.errors import InputError
from data_gen.text.documents import assistant, user
from eval.online.benchmark import benchmark
from eval.online.config import BenchmarkConfig
from eval.online.cycle import go_on
from eval.online.examples import Example
from eval.online.formats.kvpress import SCORER_OF
from eval.online.online_policies import best, indexer_policy, recency
from eval.online.runner import Runner
from eval.online.scorers import SCORERS
from eval.online.session import DenseSession
from tests.conftest import tiny_model
from tests.eval.online.suites import (
    BABILONG,
    GRAPHWALKS,
    HELMET_KV,
    HELMET_RAG,
    KVPRESS,
    SCBENCH,
    STORY,
    SUITES,
)
from tests.eval.online.test_benchmark import tiny_backbone
from tests.eval.online.test_formats import read, write


@pytest.mark.parametrize("kind", SUITES)
def test_both_rows_of_every_suite_are_read_and_their_right_answer_scores_one(tmp_path, tokenizer, kind):
    name, rows = SUITES[kind]
    found = read(write(tmp_path / name, *rows), kind, tokenizer)
    assert len({example.name for example in found}) == len(found) >= 2
    for example in found:
        assert example.benchmark == kind and not example.left_out
        right = example.references[0] if example.references else ""
        said = f"Final Answer: [{', '.join(example.references)}]" if kind == "graphwalks" else right
        assert SCORERS[example.scorer](said, example.references) == 1


def test_kvpress(tmp_path, tokenizer):
    number, kind = read(write(tmp_path / "data.jsonl", *KVPRESS), "kvpress", tokenizer)
    assert number.messages == [user(KVPRESS[0]["context"] + KVPRESS[0]["question"])]
    assert (number.task, number.scorer, number.prefix) == ("niah_single_1", "glued_match_all", "The number is")
    assert (number.references, number.answer_tokens, kind.answer_tokens) == (["4417"], 12, 84)
    assert (kind.task, kind.scorer, kind.references) == ("trec-e", "line_class", ["LOC", "LOC", "NUM", "HUM"])


@pytest.mark.parametrize(
    ("fields", "scorer", "references"),
    [
        ({"task": "qa_1", "outputs": ["a", "b"]}, "glued_match_part", ["a", "b"]),
        ({"task": "hotpotqa", "answers": ["a", "b"]}, "word_f1", ["a", "b"]),
        ({"task": "passage_retrieval_en", "answers": ["Paragraph 12"]}, "number_share", ["12"]),
        ({"task": "passage_count", "answers": ["12"]}, "number_share", ["12"]),
        ({"task": "lcc", "answers": ["return x"]}, "code_line", ["return x"]),
        ({"task": "passkey", "answer": ["71"]}, "first_digits", ["71"]),
        ({"task": "math_calc", "answer": ["1", "5"]}, "running_values", ["1", "5"]),
        (
            {"task": "longbook_choice_eng", "answer": ["C"], "question": "Who?\nA. Ann\nB. Bo\nC. Cy\nD. Di"},
            "last_choice",
            ["Cy", "C"],
        ),
        ({"task": "shortdep_cloze", "answer": '{"<mask-0>": "Bob"}'}, "filled_masks", ['{"<mask-0>": "Bob"}']),
        ({"task": "longdep_qa", "answer": "yes"}, "rouge_l_recall", ["yes"]),
        ({"task": None, "answer": "B", "choice_D": "Four"}, "choice_sentence", ["B"]),
    ],
)
def test_the_task_of_a_kvpress_row_says_its_rule(tmp_path, tokenizer, fields, scorer, references):
    row = {"context": "Text.", "question": "Who?", "answer_prefix": "", "max_new_tokens": 9} | fields
    (found,) = read(write(tmp_path / "data.json", row), "kvpress", tokenizer)
    assert (found.scorer, found.references, found.left_out, found.prefix) == (scorer, references, "", "")
    assert found.task == (fields["task"] or "longbench-v2")


def test_every_rule_of_kvpress_is_a_scorer():
    assert set(SCORER_OF.values()) <= set(SCORERS)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"task": "gov_report", "answer": ""}, "the file has no answer"),  # ZeroSCROLLS
        ({"task": "longbook_sum_eng"}, "kvpress has no rule"),
        ({"task": "vcsum"}, "jieba"),
    ],
)
def test_what_kvpress_cannot_score_is_left_out_and_says_why(tmp_path, tokenizer, fields, why):
    (found,) = read(write(tmp_path / "data.json", KVPRESS[0] | fields), "kvpress", tokenizer)
    assert why in found.left_out


def test_scbench_turns_see_the_right_answers_before_them(tmp_path, tokenizer):
    one, two, only = read(write(tmp_path / "scbench_kv" / "test-0.parquet", *SCBENCH[:1]), "scbench", tokenizer) + read(
        write(tmp_path / "scbench_kv.jsonl", SCBENCH[1]), "scbench", tokenizer
    )
    assert one.later == [] and two.messages == one.messages
    assert two.later == [assistant("v-417"), user('Key: "k2"')] and two.references == ["v-982"]
    assert (one.task, two.task, one.scorer, one.answer_tokens) == (
        "scbench_kv, turn 1",
        "scbench_kv, turn 2",
        "within",
        150,
    )
    assert STORY in only.messages[0]["content"] and only.references == ["b"]


def test_scbench_choices_and_mixed_sets(tmp_path, tokenizer):
    turn = {"input": "Who?", "answer": "Bo", "options": ["Ada", "Bo", "Cy", "Di"]}
    (found,) = read(
        write(tmp_path / "scbench_choice_eng.json", {"context": "x", "multi_turns": [turn]}), "scbench", tokenizer
    )
    assert found.scorer == "choice" and found.references == ["Bo", "B"] and "\nB. Bo\n" in found.messages[0]["content"]
    turns = [
        {"input": "f?", "answer": "def f(): pass", "task": "scbench_repoqa", "name": "f"},
        {"input": "k?", "answer": "v", "task": "scbench_kv"},
    ]
    code, value = read(
        write(tmp_path / "scbench_repoqa_and_kv.json", {"context": "x", "multi_turns": turns}), "scbench", tokenizer
    )
    assert "parses code" in code.left_out and not value.left_out and value.answer_tokens == 80
    assert value.later[0] == assistant("def f(): pass") and value.task == "scbench_repoqa_and_kv scbench_kv, turn 2"


def test_babilong(tmp_path, tokenizer):
    first, second = read(write(tmp_path / "qa1" / "data.jsonl", *BABILONG), "babilong", tokenizer)
    assert first.task == "qa1" and first.references[0] == "garden" and len(first.references) == 7
    (found,) = read(write(tmp_path / "qa8.json", BABILONG[0]), "babilong", tokenizer)
    assert "no rule" in found.left_out
    north = {"input": "x", "question": "What is north of the kitchen?", "target": "garden"}
    (found,) = read(write(tmp_path / "qa4.json", north), "babilong", tokenizer)
    assert "kitchen" not in found.references and "Where is John?" in second.messages[0]["content"]


def test_graphwalks(tmp_path, tokenizer):
    first, second = read(write(tmp_path / "data.json", *GRAPHWALKS), "graphwalks", tokenizer)
    assert first.messages == [user(GRAPHWALKS[0]["prompt"])] and first.task == "bfs" and second.task == "parents"
    assert first.references == ["bb", "cc"] and second.references == [] and first.answer_tokens > 512


def test_helmet(tmp_path, tokenizer):
    (first, _) = read(write(tmp_path / "json_kv.jsonl", *HELMET_KV), "helmet-kv", tokenizer)
    text = first.messages[0]["content"]
    assert "k9" not in text and text.index("u-3") < text.index("Key: k3") < text.index("Key: k1")
    (first, second) = read(write(tmp_path / "nq.jsonl", *HELMET_RAG), "helmet-rag", tokenizer)
    text = first.messages[0]["content"]
    assert text.index("Boats") < text.index("4417") < text.index("Who keeps the key?") and first.task == "nq"
    assert second.references == ["Bo", "Bob"] and first.answer_tokens == 20


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("kvpress", without(KVPRESS[0], "question"), "no field 'question'; it has answer, answer_prefix"),
        ("kvpress", without(KVPRESS[0], "answer"), "no field 'answer'"),
        ("kvpress", without(KVPRESS[0], "max_new_tokens"), "no field 'max_new_tokens'"),
        ("kvpress", without(KVPRESS[0], "task"), "no field 'task'; only rows of LongBench-v2"),
        ("kvpress", KVPRESS[0] | {"task": "juggling"}, "field 'task' is 'juggling', which is no task"),
        ("kvpress", KVPRESS[0] | {"answer": [3]}, "field 'answer' is neither text nor a list of texts"),
        ("kvpress", without(KVPRESS[1], "all_classes"), "no field 'all_classes'"),
        ("kvpress", KVPRESS[1] | {"answers": ["LOC", "NUM"]}, "2 answers where a class has one"),
        ("kvpress", KVPRESS[0] | {"task": "passage_retrieval_en"}, "names no paragraph"),
        ("kvpress", KVPRESS[0] | {"task": "code_debug", "answer": ["A"]}, "does not end in options A to D"),
        ("kvpress", KVPRESS[0] | {"task": "code_run", "answer": ["x"]}, "not a number"),
        ("scbench", without(SCBENCH[0], "multi_turns"), "no field 'multi_turns'"),
        ("scbench", SCBENCH[0] | {"multi_turns": ["hello"]}, "not a list of turns with an input"),
        ("scbench", SCBENCH[0] | {"multi_turns": [{"input": "x"}]}, "turn 1: field 'answer' is missing"),
        ("scbench", without(SCBENCH[0], "context"), "no field 'input'"),
        ("babilong", without(BABILONG[0], "target"), "no field 'target'"),
        ("graphwalks", without(GRAPHWALKS[0], "answer_nodes"), "no field 'answer'"),
        ("graphwalks", GRAPHWALKS[0] | {"answer_nodes": [3]}, "not a list of nodes"),
        ("helmet-kv", without(HELMET_KV[0], "demos"), "no field 'demos'"),
        ("helmet-kv", HELMET_KV[0] | {"demos": ["k"]}, "not a list of keys and values"),
        ("helmet-rag", without(HELMET_RAG[0], "ctxs"), "no field 'ctxs'"),
        ("helmet-rag", HELMET_RAG[0] | {"ctxs": ["text"]}, "not a list of passages"),
        ("helmet-rag", HELMET_RAG[0] | {"answers": []}, "field 'answers' is not a list of texts"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, tokenizer, kind, row, message):
    with pytest.raises(InputError, match=message) as caught:
        read(write(tmp_path / SUITES[kind][0], row), kind, tokenizer)
    assert "\n" not in str(caught.value) and " row 1 " in str(caught.value)


def test_a_file_that_says_no_task_is_one_line(tmp_path, tokenizer):
    for kind, rows, example in (("scbench", SCBENCH, "scbench_kv.jsonl"), ("babilong", BABILONG, "qa1.json")):
        with pytest.raises(InputError, match=rf"no file or folder named after one, as in {example}"):
            read(write(tmp_path / "data.json", *rows), kind, tokenizer)
    turn = {"input": "x", "answer": "y", "task": "scbench_vt"}
    with pytest.raises(
        InputError, match=r"turn 1: field 'task' is 'scbench_vt', not one of scbench_repoqa, scbench_kv"
    ):
        read(
            write(tmp_path / "scbench_repoqa_and_kv.json", {"context": "x", "multi_turns": [turn]}),
            "scbench",
            tokenizer,
        )
    turn = {"input": "x", "answer": "y", "options": ["y"]}
    with pytest.raises(InputError, match="turn 1: field 'options' is not four texts"):
        read(write(tmp_path / "scbench_choice_eng.json", {"context": "x", "multi_turns": [turn]}), "scbench", tokenizer)


def test_files_of_every_suite_are_asked(indexer, tokenizer, tmp_path):
    files = [f"{kind}={write(tmp_path / kind / name, *rows)}" for kind, (name, rows) in SUITES.items()]
    config = BenchmarkConfig(tasks=[], policies=["indexer", "oracle"]).changed(files)
    sections, notes = benchmark(tiny_backbone(), tokenizer, indexer, config, tmp_path / "out", lambda names, _: names)
    rows = sections["benchmark"]
    assert {row.benchmark for row in rows} == set(SUITES) and notes == ["mrcr not asked: files only (tasks: [])"]
    assert {(row.task, row.examples) for row in rows if row.benchmark == "scbench"} == {
        ("scbench_kv, turn 1", 2), ("scbench_kv, turn 2", 1)
    }  # fmt: skip
    assert all(row.kept < 0.9 for row in rows if row.policy == "indexer")
    assert [(row.task, row.policy) for row in rows if row.benchmark == "kvpress"] == [
        (task, policy) for task in ("niah_single_1", "trec-e") for policy in ("full", "indexer", "oracle")
    ]
    journal = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    said = next(record for record in journal if record["task"] == "niah_single_1")
    assert all(run["response"].startswith("The number is") for run in said["runs"])


CONVERSATION = Example(
    name="c", benchmark="scbench", task="t", length=None, messages=[user(STORY * 2)], references=["zzz"],
    scorer="within", answer_tokens=20, later=[assistant("4417"), user("And the fence?")],
)  # fmt: skip


def test_full_attention_answers_a_later_turn_as_generate_does(indexer, tokenizer):
    model = tiny_model("llama")
    whole = [*CONVERSATION.messages, *CONVERSATION.later]
    ids = replace(CONVERSATION, messages=whole, later=[]).prompt(tokenizer, False)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=3)
    record = Runner(model, tokenizer, indexer, ["indexer", "recency"], [1.0], context=512).run(CONVERSATION)
    assert record.tokens == len(ids) + 20
    for run in record.runs:  # all chunks kept: nothing is lost
        assert run.response == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_the_second_question_chooses_from_a_session_that_holds_the_first_turn(indexer, tokenizer):
    """By hand: the first question's set stays while the second turn is read; at its end it is chosen anew."""
    model, tau = tiny_model("llama"), indexer.spec.window
    first, (turn,) = CONVERSATION.prompt(tokenizer, False), CONVERSATION.turns(tokenizer, False)
    seen = []

    def keep(session):
        choice = chosen(session)
        seen.append((session.position, choice.resident[0].tolist()))
        return choice

    for rank in (indexer_policy(indexer), recency):
        chosen = best(rank, 0.2)
        by_hand = DenseSession(model, indexer.spec.chunking)
        by_hand.read(first[:-1])
        fixed = []
        for place, token in enumerate([first[-1], *turn]):
            if place % tau == 0 or place == len(turn):
                (resident,) = chosen(by_hand).resident
                by_hand.host.keep([resident])
                fixed.append((by_hand.position, resident.tolist()))
            logits = by_hand.read([token])
        runner = Runner(model, tokenizer, indexer, [], [0.2], context=512)
        session = DenseSession(model, indexer.spec.chunking)
        session.read(first[:-1])
        _, _, full = runner._lanes(session, [first[-1], *turn], [0, len(turn)], 1)[0]
        full.keep = keep
        got = []
        full.watchers.append(lambda session, logits, got=got: got.append(logits))
        seen.clear()
        go_on([full], tau)
        assert seen == fixed and fixed[-1][0] == len(first) + len(turn) - 2 and len(fixed) > 1
        assert len(fixed[-1][1]) * indexer.spec.chunking.tokens < 0.6 * fixed[-1][0]
        torch.testing.assert_close(got[len(turn)], logits)
