from hypothesis import given
from hypothesis import strategies as st

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
