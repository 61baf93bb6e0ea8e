"""Cases worked out by hand; each score is what the publisher's own code gives for them."""

import pytest

from eval.online.scorers import SCORERS

CASES = [
    ("glued_match_all", "see 12\n34", ["1234", "9"], 0.5),  # control characters are deleted
    ("glued_match_part", "it is PARIS", ["Lyon", "paris"], 1),
    ("choice_sentence", "So: **The correct answer is (B)**.", ["B"], 1),
    ("choice_sentence", "The correct answer is A", ["B"], 0),
    ("word_f1", "The old red fence", ["a red fence!", "x"], 0.8),  # 2 of 3 said, 2 of 2 right
    ("character_f1", "北京。", ["北京市"], 0.8),
    ("line_f1", "\n red fence\nand more words", ["red fence"], 1),
    ("rouge_l", "a b c. d e", ["a c. e x"], 2 * (0.6 * 0.75 / (1.35 + 1e-8))),  # sets: 3 of 5, 3 of 4
    ("rouge_l", "...", ["a b"], 0),
    ("line_rouge_l", "a b\nc", ["a b"], 1 / (1 + 0.5e-8)),
    ("rouge_l_recall", "a b c. d e", ["a c. e x"], 0.75),
    ("line_class", "LOC or NUM\nHUM", ["LOC", "LOC", "NUM", "HUM"], 0.5),
    ("line_class", "LOC:city", ["LOC:city", "LOC", "LOC:city"], 1),  # part of the right one's name
    ("line_class", "NUM", ["LOC", "LOC", "NUM"], 0),
    ("number_share", "Paragraph 7, not 8 or 7", ["7"], 2 / 3),
    ("code_line", "```python\n# note\nreturn y", ["return x"], 0.88),  # 7 of 8 characters: 87.5 in whole percent
    ("word_among", 'It is: "v1".', ["v1"], 1),
    ("word_among", "v12", ["v1"], 0),
    ("first_digits", "key: 071 and 72", ["071"], 1),
    ("first_digits", "0 71", ["71"], 0),
    ("last_number", "It returns -7.", ["-7"], 1),
    ("last_number", "7 it is", ["7"], 0),
    ("first_number", "about 3.7 or 4", ["3"], 1),
    ("first_number", "about 3.7 or 4", ["3.5"], 0),
    ("running_values", "[1, 4, 9, 8]", ["1", "4", "8", "8"], 0.5),
    ("debug_choice", "I think B", ["foo", "B"], 1),
    ("debug_choice", "the answer is: foo()", ["foo", "B"], 1),
    ("debug_choice", "the answer is: bar, not foo", ["foo", "B"], 0),
    ("choice", "B. Bo", ["Bo", "B"], 1),
    ("choice", "A or rather B", ["Bo", "B"], 0),  # the first letter
    ("choice", "The answer is: Bo", ["Bo", "B"], 1),
    ("choice", "Well, C perhaps B", ["Bo", "B"], 0),
    ("last_choice", "A or rather B", ["Bo", "B"], 1),
    ("last_choice", "A\nB", ["Bo", "B"], 0),  # the first line with a letter
    ("any_within", "it was ace, I think", ["Bo", "ACE"], 1),
    ("within", "V-1", ["v-1"], 0),
    ("share_within", "x1 and X2", ["x1", "x2", "x3"], 0.67),
    ("rouge_l_sum", "the cat sat", ["The cat ran.\nIt sat!"], 0.75),  # 3 of 3, 3 of 5
    ("filled_masks", "{'<mask-0>': 'Bob', '<mask-1>': 'x'}", ['{"<mask-0>": "Bob", "<mask-1>": "Rome"}'], 0.5),
    ("filled_masks", "Bob and Rome", ['{"<mask-0>": "Bob"}'], 0),
    ("only_label", "Mary is in the Garden. Or the office", ["garden", "garden", "office"], 1),
    ("only_label", "garden or office", ["garden", "garden", "office"], 0),
    ("only_label", "kitchen", ["kitchen", "garden", "office"], 0),  # the question names it
    ("node_f1", "Hm.\nFinal Answer: [aa, bb, aa]", ["bb", "cc"], 0.5),
    ("node_f1", "Final Answer: [bb, cc]\n", ["bb", "cc"], 0),  # not in the very last line
    ("node_f1", "Final Answer: []", [], 1),
    ("node_f1", "Final Answer: [aa]", [], 0),
    ("normal_within", "It's U-1!", ["u1"], 1),
    ("line_normal_within", "\nAda", ["Ada"], 0),
    ("line_normal_within", "the Ada Byron\nBo", ["x", "Ada, Byron"], 1),
]


@pytest.mark.parametrize(("name", "response", "references", "score"), CASES)
def test_scores_are_the_publishers(name, response, references, score):
    assert SCORERS[name](response, references) == pytest.approx(score, abs=1e-12)
