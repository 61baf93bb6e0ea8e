"""The end-to-end check refuses what it could only measure wrongly."""

import pytest

from data_gen.documents import Document
from data_gen.errors import InputError
from eval.decode.check import decode_check
from eval.decode.config import DecodeConfig
from tests.conftest import tiny_model


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
