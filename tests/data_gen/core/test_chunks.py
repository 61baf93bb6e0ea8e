import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_gen.core.chunks import Chunking


@given(st.integers(1, 64), st.integers(0, 4), st.integers(0, 16), st.integers(0, 5000), st.floats(0.001, 1))
def test_protected_and_candidates_cover_every_visible_chunk_once(tokens, sink, recent, position, budget):
    chunking = Chunking(tokens=tokens, sink=sink, recent=recent)
    seen = range(position + 1)
    visible = [c for c in range(position + 2) if all(t in seen for t in range(c * tokens, (c + 1) * tokens))]
    assert chunking.visible(position) == len(visible)
    expected = [c for c in visible if c >= sink and c < len(visible) - recent]
    assert list(range(*chunking.candidates(position))) == expected
    assert chunking.kept(budget, position) == max(1, int(budget * len(visible)))


@pytest.mark.parametrize("field", ["sink", "recent"])
def test_a_negative_number_is_refused_at_its_field(field):
    assert getattr(Chunking.model_validate({field: 0}), field) == 0
    with pytest.raises(ValidationError, match="greater than or equal to 0") as refused:
        Chunking.model_validate({field: -1})
    assert refused.value.errors()[0]["loc"] == (field,)
