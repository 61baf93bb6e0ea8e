"""What the pocket language promises: documents of exact length, with a findable, unique and far answer."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.pocket.batches import StageBatches
from recipes.pocket.config import VocabularyConfig
from recipes.pocket.tasks import TASKS, PocketDocument, asked_once, solved, training_document
from recipes.pocket.tasks import test_documents as final_documents
from recipes.pocket.words import build_lexicon, build_tokenizer, filler

LEXICON = build_lexicon(VocabularyConfig(keys=96, names=48, values=128, ordinals=8))
OPENERS = ("note", "alias", "step")


def facts_of(words):
    """(position, words) of every statement of a fact."""
    return [(i, words[i : i + 4]) for i, word in enumerate(words) if word in OPENERS]


def answer_of(words):
    """The answer to the question at the end, worked out from the text alone; values of a key as a set."""
    facts = [fact for _, fact in facts_of(words)]
    notes = [(key, value) for kind, key, value, _ in facts if kind == "note"]
    question = words[-3:]
    if question[1:] == ["repeat", "?"]:
        steps = {ordinal: value for kind, ordinal, value, _ in facts if kind == "step"}
        return [word for o in LEXICON.ordinals if o in steps for word in (o, steps[o])]
    kind, subject, mark = question
    assert mark == "?"
    if kind == "trace":
        (key,) = [key for opener, name, key, _ in facts if opener == "alias" and name == subject]
        (value,) = [v for k, v in notes if k == key]
        return [key, value]
    values = [v for k, v in notes if k == subject]
    if kind == "recall":
        (value,) = values
        return [value]
    assert kind == "list" and len(set(values)) == len(values)
    return set(values)


documents = st.builds(
    lambda task, length, distractors, seed: final_documents(LEXICON, [task], length, distractors, Random(seed))[0],
    st.sampled_from(TASKS),
    st.integers(256, 1500),
    st.integers(1, 8),
    st.integers(0, 10**6),
)


@settings(max_examples=150, deadline=None)
@given(documents)
def test_a_document_holds_one_answer_and_its_exact_length(document):
    words, answer = document.prompt.split(), document.answer.split()
    assert 1 + len(words) + len(answer) == document.length  # <bos>
    found = answer_of(words)
    if document.task == "multi_value":
        assert set(answer[::2]) == found
        assert set(answer[1::2]) == {words[-2]}  # the key joins the values
    else:
        assert answer == found
    assert solved(document, document.answer)
    assert not set(answer) & set(words[-3:]) - {words[-2]}


@settings(max_examples=150, deadline=None)
@given(documents)
def test_no_compression_window_holds_two_facts(document):
    words = document.prompt.split()
    told = [{start + 1, start + 2} for start, _ in facts_of(words)]  # what it is about, and what it says
    for begin in range(len(words) - 7):
        window = set(range(begin, begin + 8))
        assert sum(bool(window & fact) for fact in told) <= 1


def test_a_single_needle_has_no_other_and_distractors_differ_from_it():
    one = final_documents(LEXICON, ["single"], 600, 8, Random(1))[0].prompt.split()
    assert len(facts_of(one)) == 1
    many = final_documents(LEXICON, ["multi_key"], 600, 8, Random(1))[0].prompt.split()
    keys = [fact[1] for _, fact in facts_of(many)]
    assert len(keys) == 9 == len(set(keys))


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="64 tokens cannot hold 33 facts"):
        final_documents(LEXICON, ["multi_key"], 64, 32, Random(0))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([training_document, asked_once]), st.integers(60, 900), st.integers(20, 80), st.integers(0, 10**6)
)
def test_training_answers_follow_from_far_text(made, length, far, seed):
    """Every answer is the one the text before it gives, and no word that tells it is nearer than `far`."""
    words, tasks = made(LEXICON, length, far, Random(seed))
    length = len(words) if made is asked_once else length
    assert len(words) == len(tasks) == length
    for start in range(length):
        if tasks[start] < 0 or tasks[start - 1] >= 0:
            continue
        end = next((i for i in range(start, length) if tasks[i] < 0), length)
        answer, text = words[start:end], words[:start]
        mark = start - 2 if text[-2] == "repeat" else start - 3
        expected = answer_of(text)
        if TASKS[tasks[start]] == "multi_value":
            assert set(answer[::2]) <= expected
        else:
            assert answer == expected[: len(answer)]
        told = set(answer[::2] if tasks[start] != TASKS.index("tracking") else answer)
        subjects = {text[-2]} - {"repeat"}
        near = words[max(0, mark - far + 1) : mark]
        statements = [fact for _, fact in facts_of(near) if len(fact) == 4]
        assert not [f for f in statements if f[1] in subjects | told or (f[0] == "step" and not subjects)]


@settings(max_examples=60, deadline=None)
@given(st.integers(512, 2000), st.integers(20, 60), st.integers(0, 10**6))
def test_nothing_is_asked_twice_and_facts_come_first(length, far, seed):
    words, tasks = asked_once(LEXICON, length, far, Random(seed))
    assert len(words) <= length
    places = [place for place, word in enumerate(words) if word == "?"]
    questions = [words[place - 1] for place in places]  # the subject, or "repeat"
    assert questions and len(set(questions)) == len(questions)
    assert max(place for place, _ in facts_of(words)) < places[0]
    assert all(tasks[place + 1] >= 0 for place in places if place + 1 < len(words))


def test_batches_depend_on_seed_stage_and_step_only(tiny):
    tokens, tasks = StageBatches(tiny, 0)[7]
    again, marks = StageBatches(tiny, 0)[7]
    assert tokens.equal(again) and tasks.equal(marks)
    assert tokens.shape == tasks.shape == (tiny.stages[0].batch, tiny.stages[0].length)
    assert not tokens.equal(StageBatches(tiny, 0)[8][0])
    other = tiny.model_copy(update={"seed": tiny.seed + 1})
    assert not tokens.equal(StageBatches(other, 0)[7][0])
    words = build_tokenizer(build_lexicon(tiny.vocabulary)).convert_ids_to_tokens(tokens[0].tolist())
    assert words[0] == "<bos>" and "<unk>" not in words


@pytest.mark.parametrize(
    ("task", "answer", "completion", "right"),
    [
        ("single", "417", "417 . and more", True),
        ("single", "417", "418", False),
        ("multi_value", "233 bako 417", "417 bako 233 .", True),
        ("multi_value", "233 bako 417", "417 bako 417", False),
        ("multi_value", "133 tuger 117 tuger 120", "120 tuger 120 tuger 120", False),
        ("tracking", "bako 417", "bako 233", False),
        ("copy", "first 417 second 233", "second 233 first 417", False),
        ("single", "417", "", False),
    ],
)
def test_only_the_whole_answer_counts(task, answer, completion, right):
    assert solved(PocketDocument(task, "", answer, 0), completion) is right


def test_filler_never_states_or_asks():
    words = set(filler(Random(0), 5000))
    special = {*OPENERS, "recall", "list", "trace", "repeat", "?", *LEXICON.ordinals, *LEXICON.keys, *LEXICON.values}
    assert not words & special


def test_documents_on_one_text_differ_in_their_question():
    asked = ["multi_key", "multi_value", "tracking", "copy"]
    documents = final_documents(LEXICON, asked, 800, 8, Random(3))
    assert [document.task for document in documents] == asked and max(d.length for d in documents) == 800
    bodies = {" ".join(document.prompt.split()[: -2 if document.task == "copy" else -3]) for document in documents}
    assert len(bodies) == 1
    for document in documents:
        found, answer = answer_of(document.prompt.split()), document.answer.split()
        assert len(document.prompt.split()) + len(answer) + 1 == document.length
        assert set(answer[::2]) == found if document.task == "multi_value" else answer == found
