"""Scores worked out by hand."""

import pytest
import torch
from torch.nn import functional

from eval.online.scorers import (
    FOLLOWERS,
    SCORERS,
    answer_words,
    every_value,
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
    assert SCORERS["refusal"] is refusal and list(SCORERS) == list(RIGHT)


RIGHT = {
    "string_match_all": ("12, 34", ["12", "34"]),
    "string_match_part": ("34", ["12", "34"]),
    "multiple_choice": ("The correct answer is (B)", ["B"]),
    "sequence_ratio": ("xyz The fox.", ["xyz The fox.", "xyz"]),
    "answer_words": ("a red kite", ["The red kite"]),
    "refusal": ("You never mentioned it.", [""]),
    "every_value": ("12, 34 and more", ["12", "34"]),
} | {
    "glued_match_all": ("12, 34", ["12", "34"]),
    "glued_match_part": ("34", ["12", "34"]),
    "choice_sentence": ("The correct answer is B", ["B"]),
    "word_f1": ("red kite", ["The red kite"]),
    "character_f1": ("北京", ["北京。"]),
    "line_f1": ("red kite", ["red kite"]),
    "rouge_l": ("red kite", ["red kite"]),
    "line_rouge_l": ("red kite", ["red kite"]),
    "rouge_l_recall": ("a red kite", ["red kite"]),
    "line_class": ("LOC", ["LOC", "NUM", "LOC"]),
    "number_share": ("7", ["7"]),
    "code_line": ("return x", ["return x"]),
    "word_among": ("it is v1.", ["v1"]),
    "first_digits": ("71", ["71"]),
    "last_number": ("7", ["7"]),
    "first_number": ("7", ["7"]),
    "running_values": ("1, 5", ["1", "5"]),
    "debug_choice": ("B", ["foo", "B"]),
    "choice": ("B", ["Bo", "B"]),
    "last_choice": ("B", ["Bo", "B"]),
    "any_within": ("ada", ["Ada"]),
    "within": ("v-1", ["v-1"]),
    "share_within": ("v-1", ["V-1"]),
    "rouge_l_sum": ("red kite", ["red kite"]),
    "filled_masks": ("{'a': 'b'}", ["{'a': 'b'}"]),
    "only_label": ("garden", ["garden", "garden", "office"]),
    "node_f1": ("Final Answer: [a]", ["a"]),
    "normal_within": ("it is u-1", ["u-1"]),
    "line_normal_within": ("Ada", ["Ada"]),
}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_of_the_list_tells_right_from_nothing(name):
    response, references = RIGHT[name]
    right = 1 / (1 + 0.5e-8) if name in ("rouge_l", "line_rouge_l") else 1  # its F has 1e-8 in the denominator
    assert SCORERS[name](response, references) == pytest.approx(right, abs=1e-15)
    assert SCORERS[name]("", references) == 0


def test_every_value_is_all_or_nothing_and_minds_case():
    assert [every_value(said, ["Ab", "1"]) for said in ("1 Ab!", "Ab", "ab 1")] == [1, 0, 0]


@pytest.mark.parametrize("name", FOLLOWERS)
def test_every_follower_of_the_list_has_the_means_over_the_text(name):
    generator = torch.Generator().manual_seed(1)
    full, other = 3 * torch.randn(2, 7, 50, generator=generator)
    targets = torch.randint(50, (7,), generator=generator)
    first = FOLLOWERS[name](targets.tolist(), None)
    second = FOLLOWERS[name](targets.tolist(), first)
    for row, beside in zip(full, other, strict=True):
        first.add(row)
        second.add(beside)
    assert first.means() | {"loss": 0} == {"agreement": 1, "kl": 0, "loss": 0}
    log_p = other.log_softmax(-1)
    kl = functional.kl_div(log_p, full.log_softmax(-1), reduction="batchmean", log_target=True)
    agreement = (full.argmax(-1) == other.argmax(-1)).double().mean()
    expected = {"agreement": agreement, "kl": kl, "loss": functional.cross_entropy(other, targets)}
    assert second.means() == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-5)
