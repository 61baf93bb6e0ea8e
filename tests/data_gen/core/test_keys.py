from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.key_bytes import encode_keys, hadamard
from data_gen.core.keys import (
    KEY_RECIPES,
    KeyKind,
    KeyPooler,
    check_stored,
    flatten_heads,
    key_vectors,
    mean_pooled_scores,
)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_pooling_in_pieces_equals_pooling_at_once(pieces, chunk_tokens):
    keys = torch.randn(2, sum(pieces), 3, generator=torch.Generator().manual_seed(sum(pieces)))
    pooler = KeyPooler(chunk_tokens)
    for piece in keys.split(pieces, dim=1):
        pooler.append(piece)
    chunks = sum(pieces) // chunk_tokens
    assert pooler.pooled.shape == (2, chunks, 3)
    for chunk in range(chunks):
        expected = keys[:, chunk * chunk_tokens : (chunk + 1) * chunk_tokens].mean(1)
        torch.testing.assert_close(pooler.pooled[:, chunk], expected)
    assert torch.equal(flatten_heads(pooler.pooled)[:, :3], pooler.pooled[0])


def test_mean_pooled_scores_use_the_right_key_head_and_hide_the_future():
    torch.manual_seed(0)
    queries, pooled = torch.randn(4, 2, 8), torch.randn(2, 6, 8)
    scores = mean_pooled_scores(queries, pooled, 0.5, torch.tensor([4, 6]))
    for row, visible in enumerate((4, 6)):
        logits = [pooled[head // 2, :visible] @ queries[head, row] * 0.5 for head in range(4)]
        expected = torch.stack(logits).softmax(dim=1).mean(dim=0)
        torch.testing.assert_close(scores[row, :visible], expected)
        assert not scores[row, visible:].any()


@pytest.mark.parametrize("kind", get_args(KeyKind))
def test_stored_keys_of_every_kind_meet_their_queries(kind):
    """Scores of decoded keys with turned queries are those of the keys themselves, but for rounding."""
    recipe = KEY_RECIPES[kind]
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 16), torch.randn(5, 16)
    stored = encode_keys(hadamard(keys)) if kind == "fp8_rope_hadamard" else keys.half()
    assert stored.dtype == recipe.dtype and stored.shape == (5, recipe.row(16))
    check_stored(stored)
    torch.testing.assert_close(recipe.turn(queries) @ key_vectors(stored).T, queries @ keys.T, atol=0.5, rtol=0.1)
    assert list(KEY_RECIPES) == list(get_args(KeyKind))
