"""Every needle task hides what it asks for, and words training and held-out documents differently."""

import random
from itertools import combinations
from typing import get_args

import pytest

from data_gen.text.needles import KEYS, NEEDLE_TASKS, WORDINGS, Vocabulary, make_task


@pytest.mark.parametrize("split", get_args(Vocabulary))
@pytest.mark.parametrize("name", NEEDLE_TASKS)
def test_every_task_hides_what_it_asks_for(name, split):
    task = make_task(name, split, random.Random(f"{name} {split}"), keys=3, values=2)
    counts = NEEDLE_TASKS[name](3, 2)
    assert len(task.needles) == counts.asked + counts.others and task.asked == len(task.values) == counts.asked
    texts = [sentence for sentence, _ in task.needles]
    assert len(set(texts)) == len(texts) and all(0 <= depth < 1 for _, depth in task.needles)
    for value, sentence in zip(task.values, texts, strict=False):
        assert value in sentence and value in task.answer and value not in task.question
    assert not any(value in sentence for value in task.values for sentence in texts[counts.asked :])
    (key,) = [key for key in KEYS[split] if f"the {key}" in task.question or f"'s {key}" in task.question
              or f"one {key}" in task.question or f"under {key}" in task.question
              or f"broken {key}" in task.question]  # fmt: skip
    assert all(key in sentence for sentence in texts[: counts.asked])
    assert not any(f" {key} " in f"{sentence[:-1]} " for sentence in texts[counts.asked :])


def test_no_two_vocabularies_share_words_of_a_question():
    for one, other in combinations(get_args(Vocabulary), 2):
        assert not {wording.needle for wording in WORDINGS[one]} & {wording.needle for wording in WORDINGS[other]}
        assert not set(KEYS[one]) & set(KEYS[other])
