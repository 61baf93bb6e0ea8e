"""Every generated example holds what it asks for where it says, fits its length, and is not training's."""

import json
import re
from collections import Counter

import pytest

from data_gen.core.errors import InputError
from data_gen.text.needles import KEYS, WORDINGS
from eval.online.config import TASKS, BenchmarkConfig
from eval.online.examples import TextExample
from eval.online.generated import QUESTIONS, Haystack, generate_examples, hide
from eval.online.scorers import SCORERS

LENGTHS = [3000, 6000]
CONFIG = BenchmarkConfig(examples=3, texts=2, text_tokens=200, common=2)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack("builtin", "text", 0.2, tokenizer, max(LENGTHS))


@pytest.fixture(scope="module")
def examples(haystack, tokenizer):
    return {name: build() for name, build in _examples(haystack, tokenizer).items()}


def _examples(haystack, tokenizer, config=CONFIG, lengths=LENGTHS):
    return generate_examples(config, lengths, haystack, tokenizer, thinking=False)


def of_task(examples, *tasks):
    found = [example for example in examples.values() if example.task in tasks]
    assert len(found) == len(tasks) * CONFIG.examples * len(LENGTHS)
    return found


def test_every_task_and_length_shortest_first_and_the_same_again(examples, haystack, tokenizer):
    counts = Counter((example.task, example.length) for example in examples.values())
    expected = {(task, length): CONFIG.examples for task in (*QUESTIONS, "aggregation", "mrcr") for length in LENGTHS}
    assert counts == expected | {("text", length): CONFIG.texts for length in LENGTHS}
    assert [example.length for example in examples.values()] == sorted(e.length for e in examples.values())
    again = _examples(haystack, tokenizer)
    assert {name: again[name]() for name in list(again)[::7]} == {name: examples[name] for name in list(again)[::7]}
    reseeded = _examples(haystack, tokenizer, CONFIG.model_copy(update={"seed": 1}))["single-3000-0000"]()
    assert reseeded.messages != examples["single-3000-0000"].messages


def test_length_is_used_and_kept(examples, tokenizer):
    for example in examples.values():
        if isinstance(example, TextExample):
            assert len(example.tokens) == example.length and example.follow == 200
            continue
        size = len(example.prompt(tokenizer, False)) + len(example.opening(tokenizer)) + example.answer_tokens
        step = 200 if example.task == "mrcr" else 64  # MRCR grows by whole turns
        assert example.length - step < size <= example.length, example.name


def test_a_right_answer_is_right(examples):
    for example in examples.values():
        if not isinstance(example, TextExample):
            answer = f"{example.prefix} {' and '.join(example.references)}"
            answer = example.references[0] if example.task == "mrcr" else answer
            assert SCORERS[example.scorer](answer, example.references) == 1
            assert SCORERS[example.scorer](example.prefix, example.references) == 0, "the prefix gives it away"


def test_answers_of_needles_lie_at_the_stated_depth(examples):
    for example in of_task(examples, *QUESTIONS):
        text, question = example.messages[0]["content"].rsplit("\n\n", 1)
        text = text.removeprefix("Read the text below, then answer the question at its end.\n\n")
        lines = [line for line in text.split("\n\n") if any(value in line for value in example.references)]
        depths = [text.index(line) / len(text) for line in lines]
        if example.task != "variable_tracking":
            assert len(lines) == len(example.references) and example.depth == pytest.approx(sum(depths) / len(depths))
        assert 0 <= example.depth <= 0.95 and question.endswith(("?", "all of them.", "above."))


def test_multi_key_has_other_keys_in_the_same_wording(examples):
    for example in of_task(examples, "multi_key"):
        text = example.messages[0]["content"]
        start = next(w.needle.split("{key}")[0] for w in WORDINGS["heldout"] if w.needle.split("{key}")[0] in text)
        assert len(re.findall(re.escape(start) + r"\w+ \w+ \d{5}\.", text)) == 1 + CONFIG.keys


def test_variables_form_one_chain(examples):
    for example in of_task(examples, "variable_tracking"):
        found = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", example.messages[0]["content"])
        assert [name for name, _ in found] == example.references
        assert [source for _, source in found[1:]] == example.references[:-1] and found[0][1].isdigit()


def test_common_words_are_ten_times_as_common(examples):
    for example in of_task(examples, "aggregation"):
        counts = Counter(re.findall(r"^\d+\. (\w+)$", example.messages[0]["content"], re.MULTILINE))
        (first, often), (second, same), (_, rest) = counts.most_common(3)
        assert {first, second} == set(example.references) and often == same == 10 * rest
        assert len(set(counts.values())) == 2


def test_common_words_stay_the_most_common_where_words_run_out(haystack, tokenizer):
    found = _examples(haystack, tokenizer, CONFIG.model_copy(update={"tasks": ["aggregation"]}), [60_000])
    counts = Counter(re.findall(r"^\d+\. (\w+)$", found["aggregation-60000-0000"]().messages[0]["content"], re.M))
    assert counts.most_common(3)[1][1] == 10 * counts.most_common(3)[2][1] and min(counts.values()) > 1


def test_mrcr_asks_for_one_of_many_like_notes(examples):
    for example in of_task(examples, "mrcr"):
        answer, mark = example.references
        ask = example.messages[-1]["content"]
        number, topic = re.search(r"to the (\d+)\w\w \(1 indexed\) note about the (\w+)\.", ask).groups()
        asked = [k for k, m in enumerate(example.messages) if m["content"] == f"Write a note about the {topic}."]
        place = asked[int(number) - 1]
        assert len(asked) > 5 and mark in ask and example.messages[place + 1]["content"] == answer.removeprefix(mark)
        assert example.depth == pytest.approx(place / (len(example.messages) - 1))
        assert [m["role"] for m in example.messages] == ["user", "assistant"] * (len(example.messages) // 2) + ["user"]


def test_nothing_is_training_material(examples, tokenizer):
    told = [wording.needle.split("{key}")[0] for wording in WORDINGS["train"]]
    for example in of_task(examples, *QUESTIONS, "mrcr"):
        text = "\n".join(message["content"] for message in example.messages)
        assert not any(start in text for start in told)
        for key in KEYS["train"]:
            assert not re.search(rf"the {key}\b", example.messages[-1]["content"].split("\n\n")[-1])
    trained = Haystack("builtin", "text", 1.0, tokenizer, 6000)
    assert len(trained.paragraphs) > 50


def test_haystack_is_the_held_out_side_only(tokenizer):
    from data_gen.text.sources import read_source, split_paragraphs

    held = Haystack("builtin", "text", 0.2, tokenizer, 2000)
    sides = {True: set(), False: set()}
    for heldout, paragraphs in split_paragraphs(read_source("builtin", "text"), 0.2):
        sides[heldout].update(paragraphs)
    assert {text for text, _ in held.paragraphs} <= sides[True] and not sides[True] & sides[False]


def test_needles_go_to_the_joint_nearest_to_their_depth():
    paragraphs = ["a" * 10, "b" * 30, "c" * 60]
    placed = hide(paragraphs, [("deep", 0.45), ("first", 0.0), ("later", 0.39), ("end", 0.8)])
    assert placed == ["first", "a" * 10, "b" * 30, "later", "deep", "c" * 60, "end"]


def test_bad_requests_are_one_clear_line(tokenizer, haystack, tmp_path):
    with pytest.raises(InputError, match=r"300 tokens leave no room for text in single-300-0000"):
        _examples(haystack, tokenizer, lengths=[300])
    with pytest.raises(InputError, match="text_tokens: 2000 is more than half"):
        _examples(haystack, tokenizer, BenchmarkConfig(text_tokens=2000, tasks=["text"]))
    with pytest.raises(InputError, match=r"common: 4000 needs 44000 words"):
        _examples(haystack, tokenizer, CONFIG.model_copy(update={"common": 4000}))
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(InputError, match="holds chats"):
        Haystack(str(chats), "text", 1.0, tokenizer, 10)
    chats.write_text('{"te": 1}\n' + json.dumps({"text": "hello world. " * 9}) + "\n")
    with pytest.raises(InputError, match="line 1: needs a text field"):
        Haystack(str(chats), "text", 1.0, tokenizer, 10)
    kept = Haystack(str(chats), "text", 1.0, tokenizer, 10, "skip")
    assert len(kept.paragraphs) == kept.skipped.count == 1
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "hello world"}\n')
    with pytest.raises(InputError, match="12 tokens of text that training did not see, but 100"):
        Haystack(str(few), "text", 1.0, tokenizer, 100)
    with pytest.raises(ValueError, match="extra"):
        BenchmarkConfig.model_validate({"length": [1]})
    assert set(TASKS) == {*QUESTIONS, "aggregation", "text", "mrcr"}
