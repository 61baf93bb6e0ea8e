"""The end-to-end check: what it refuses to measure, and when an answer is long enough."""

import pytest

from data_gen.core.errors import InputError
from data_gen.text.documents import Document
from eval.online.config import DecodeConfig
from eval.online.decode import decode_check
from eval.online.runner import stop_tokens
from eval.online.session import open_session
from tests.conftest import tiny_model
from tests.eval.online.courses import keeps, written


@pytest.mark.parametrize(("length", "fits"), [(40, False), (64, False), (65, False), (66, True)])
def test_a_followed_document_keeps_a_prompt(indexer, tokenizer, length, fits):
    document = Document("heldout-document-0000", "document", [65 + n % 26 for n in range(length)], length, [], [])
    arguments = (tiny_model("llama"), tokenizer, indexer, [document], DecodeConfig(text_tokens=64))
    if fits:
        rows, _ = decode_check(*arguments, lambda items, _: items)
        assert {row.agreement for row in rows if row.policy == "full"} == {1.0}
        return
    with pytest.raises(InputError, match=f"0000: {length} tokens leave no prompt before the last 64; lower"):
        decode_check(*arguments, lambda items, _: items)


def test_an_answer_that_ends_when_it_is_right_is_judged_as_the_whole_one(indexer, tokenizer):
    """The value asked for is one that some policies write in the middle of their answer, and others never."""
    model, config = tiny_model("llama"), DecodeConfig(answer_tokens=24)
    ids = [65 + n * n % 26 for n in range(80)]
    session = open_session(model, indexer.spec)
    session.read(ids[:69])
    stop = stop_tokens(model, tokenizer)
    policies = keeps(indexer, config.budget)
    whole = written(session, policies, indexer.spec.window, ids[69], 24, lambda answer: answer[-1] in stop)
    texts = {name: tokenizer.decode(answer, skip_special_tokens=True) for name, (answer, _) in whole.items()}
    middle = max(texts.values(), key=len)[8:11]
    document = Document("heldout-single-0000", "single", ids, 70, [], [], values=[middle])
    rows, (answers,) = decode_check(model, tokenizer, indexer, [document], config, lambda items, _: items)
    for row in rows:
        assert row.correct == (middle in texts[row.policy])
        answer, text = answers.said[row.policy], texts[row.policy]
        assert answer == (text[: text.index(middle) + len(middle)] if row.correct else text)
    assert 0 < sum(row.correct for row in rows) < len(rows)
