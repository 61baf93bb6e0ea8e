"""Whatever sets follow each other, every row holds the chunk that the table says, and a move accounts for all of it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.runtime.hosts.resident import PAD, ResidentTable


def entry(sequence, chunk):
    return 1000 * sequence + chunk


@st.composite
def histories(draw):
    """Turns of (chunks made, resident set of each sequence) for one to three sequences."""
    batch, total, turns = draw(st.integers(1, 3)), 0, []
    for _ in range(draw(st.integers(1, 6))):
        made = draw(st.integers(0, 9))
        total += made
        chunks = st.sets(st.integers(0, total - 1)) if total else st.just(set())
        turns.append((made, [sorted(draw(chunks)) for _ in range(batch)]))
    return batch, turns


@settings(max_examples=200)
@given(histories())
def test_rows_hold_what_the_table_says(history):
    batch, turns = history
    table, total = ResidentTable(), 0
    rows = torch.empty(batch, 0, dtype=torch.int64)
    before = [set() for _ in range(batch)]
    for made, resident in turns:
        fresh = [[entry(sequence, total + i) for i in range(made)] for sequence in range(batch)]
        rows = torch.cat([rows, torch.tensor(fresh, dtype=torch.int64).reshape(batch, made)], dim=1)
        total += made
        before = [chunks | set(range(total - made, total)) for chunks in before]
        move = table.plan([torch.tensor(chunks, dtype=torch.int64) for chunks in resident], total)
        after = [set(chunks) for chunks in resident]
        assert move.fetched == sum(len(new - old) for new, old in zip(after, before, strict=True))
        assert move.evicted == sum(len(old - new) for new, old in zip(after, before, strict=True))
        table.fix(move, total)
        moved = torch.full(move.shape, PAD)
        moved[move.stay_to] = rows[move.stay]
        moved[move.fetch_to] = entry(*move.fetch)
        rows, before = moved, after
        for sequence, chunks in enumerate(resident):
            pads = move.shape[1] - len(chunks)
            assert rows[sequence].tolist() == [PAD] * pads + [entry(sequence, chunk) for chunk in chunks]
            assert table.chunks(total, batch)[sequence, pads:].tolist() == chunks
        assert table.padded() == (len({len(chunks) for chunks in resident}) > 1)
        assert table.evicted() == any(len(chunks) < total for chunks in resident)
