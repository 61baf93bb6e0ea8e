"""Lookahead windows against their definition, row by row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from data_gen.core.chunks import Chunking
from data_gen.traces.labels import lookahead_windows
from data_gen.traces.types import Span


def defined(spans, positions, chunking, length, every, shortest):
    found = []
    for span in spans:
        for row in range(span.serve, span.last, every):
            end = min(row + length, span.last)
            long_enough = end - row == length or (span.tail and end - row >= shortest)
            first, last = chunking.candidates(positions[row])
            if long_enough and last > first:
                found.append([row, end])
    return found


@st.composite
def documents(draw):
    """(spans that follow one another, position of each of their rows)."""
    spans, rows = [], 0
    for _ in range(draw(st.integers(0, 3))):
        last = rows + draw(st.integers(1, 30))
        spans.append(Span(first=rows, last=last, serve=draw(st.integers(rows, last)), tail=draw(st.booleans())))
        rows = last
    return spans, sorted(draw(st.lists(st.integers(0, 300), min_size=rows, max_size=rows)))


@given(
    documents(),
    st.builds(Chunking, tokens=st.integers(1, 16), sink=st.integers(0, 4), recent=st.integers(0, 8)),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 20),
)
def test_windows_are_those_of_the_definition(document, chunking, length, every, shortest):
    spans, positions = document
    given = length, every, shortest
    found = lookahead_windows(spans, torch.tensor(positions, dtype=torch.int64), chunking, *given)
    assert found.dtype == torch.int64 and found.shape[1] == 2
    assert found.tolist() == defined(spans, positions, chunking, *given)
