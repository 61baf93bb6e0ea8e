"""Validated settings of the decode check."""

from pydantic import Field, NonNegativeInt, PositiveInt

from data_gen.config import Strict


class DecodeConfig(Strict):
    """budget: share of chunks kept on top of the protected ones; answer_tokens: longest generated answer;
    text_documents, text_tokens: plain-text documents whose last tokens are followed under each policy."""

    budget: float = Field(0.1, gt=0, le=1)
    answer_tokens: PositiveInt = 40
    text_documents: NonNegativeInt = 2
    text_tokens: PositiveInt = 256
