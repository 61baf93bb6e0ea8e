"""Scores worked out by hand."""

import pytest

from eval.online.scorers import (
    SCORERS,
    answer_words,
    multiple_choice,
    refusal,
    sequence_ratio,
    string_match_all,
    string_match_part,
)


@pytest.mark.parametrize(
    ("response", "references", "score"),
    [
        ("the numbers are 12 and 34.", ["12", "34"], 1.0),
        ("only 12", ["12", "34"], 0.5),
        ("ABC\x00def", ["abc\ndef"], 1.0),  # control characters are line ends, case is nothing
        ("", ["12"], 0.0),
    ],
)
def test_all_references_count_alike(response, references, score):
    assert string_match_all(response, references) == score


def test_one_reference_is_enough_for_part():
    assert string_match_part("It was Paris, France", ["Lyon", "paris"]) == 1
    assert string_match_part("It was Nice", ["Lyon", "paris"]) == 0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("The correct answer is (B)", 1.0),
        ("Well. **The correct answer is B**.", 1.0),
        ("The correct answer is (A). The correct answer is B", 0.0),  # brackets first
        ("B", 0.0),
        ("the correct answer is (B)", 0.0),
    ],
)
def test_choice_is_read_as_published(response, score):
    assert multiple_choice(response, ["B"]) == score


def test_sequence_ratio_needs_the_prefix_and_leaves_it_out():
    assert sequence_ratio("xYzabcd", ["xYzabcd", "xYz"]) == 1
    assert sequence_ratio("xYzabef", ["xYzabcd", "xYz"]) == 0.5  # 2 * 2 matched of 4 + 4
    assert sequence_ratio("abcd", ["xYzabcd", "xYz"]) == 0


def test_answer_words_forgives_articles_case_and_punctuation():
    assert answer_words("a Degree, in business administration!", ["Business Administration"]) == 1
    assert answer_words("The business.", ["Business Administration"]) == 0.5
    assert answer_words("anything", ["the"]) == 0  # nothing to find


def test_refusal():
    assert refusal("You didn\N{RIGHT SINGLE QUOTATION MARK}t mention that.", []) == 1
    assert refusal("It was blue.", []) == 0


def test_scorers_by_name():
    assert SCORERS["refusal"] is refusal and len(SCORERS) == 6
