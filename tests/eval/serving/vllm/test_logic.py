"""Settings, sequences, keys, tables and memory, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from data_gen.core.keys import KeyPooler
from eval.serving.vllm.checks import check_shape, supported
from eval.serving.vllm.keys import BlockKeys
from eval.serving.vllm.memory import Memory
from eval.serving.vllm.sequences import NOTHING, Chosen, Counters, Sequence, Sequences
from eval.serving.vllm.settings import load_settings
from eval.serving.vllm.tables import Tables
from eval.serving.vllm.worker import Worker
from indexer_train.config import IndexerConfig
from indexer_train.selection import Budget, Coverage, Threshold
from indexer_train.spec import IndexerSpec


def test_settings_come_from_the_environment_and_the_engine():
    environment = {"LOOKAHEAD_BUNDLE": "b", "LOOKAHEAD_BUDGET": "0.1", "LOOKAHEAD_LAG": "1", "PATH": "/bin"}
    settings = load_settings({"lookahead": {"budget": 0.2}}, environment)
    assert (settings.selection, settings.lag, settings.fallback) == (Budget(budget=0.2), 1, None)
    settings = load_settings(
        {}, {"LOOKAHEAD_BUNDLE": "b", "LOOKAHEAD_THRESHOLD": "0", "LOOKAHEAD_CAP": "9", "LOOKAHEAD_FULL_ABOVE": "2"}
    )
    assert isinstance(settings.selection, Threshold)
    assert settings.fallback.full_above == 2
    settings = load_settings({"lookahead": {"coverage": 0.9}}, {"LOOKAHEAD_BUNDLE": "b"})
    assert settings.selection == Coverage(share=0.9)
    assert load_settings({}, {"LOOKAHEAD_BUNDLE": "b", "LOOKAHEAD_COVERAGE": ".9"}).selection == settings.selection


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "bundle: Field required"),
        ({"bundle": "b", "budgets": "0.1"}, "budgets: Extra inputs"),
        ({"bundle": "b", "budget": "0"}, "budget: Input should be greater than 0"),
        ({"bundle": "b", "budget": ".1", "threshold": "0"}, "budget and threshold: give only one"),
        ({"bundle": "b", "coverage": ".9", "threshold": "0"}, "threshold and coverage: give only one"),
        ({"bundle": "b", "coverage": "0"}, "coverage: Input should be greater than 0"),
        ({"bundle": "b", "coverage": "1.1"}, "coverage: Input should be less than or equal to 1"),
        ({"bundle": "b", "full_above": "2"}, "full_above: a multiple of the cap"),
        ({"bundle": "b", "lag": "2"}, "lag: Input should be 0 or 1"),
        ({"bundle": "b", "lag": "1", "host_gib": "1"}, "lag: blocks that come back"),
        ({"bundle": "b", "threshold": "nan"}, "threshold: Input should be a finite number"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(given, said):
    with pytest.raises(InputError, match=said) as error:
        load_settings({}, {f"LOOKAHEAD_{name.upper()}": value for name, value in given.items()})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="not a table"):
        load_settings({"lookahead": 3}, {})


def read(sequence, position, lag=0, window=4):
    """One token read alone; returns what it could read, with sets named by their position."""
    sequence.begin(position)
    if sequence.due(window):
        sequence.choose(Chosen(sequence.position, (sequence.position + 1) // 2, torch.tensor([sequence.position])), lag)
    sequence.position = position
    return sequence.force.position


def test_a_set_serves_a_window():
    sequence = Sequence(position=9)
    assert [read(sequence, position) for position in range(10, 20)] == [9, 9, 9, 9, 13, 13, 13, 13, 17, 17]


def test_with_lag_the_first_set_serves_at_once_and_others_a_token_later():
    sequence = Sequence(position=9)
    assert [read(sequence, position, lag=1) for position in range(10, 20)] == [9] * 5 + [13] * 4 + [17]


def test_a_gap_and_a_prompt_start_anew():
    sequences = Sequences()
    sequence = sequences.enter("a", 9, alone=False)
    sequence.position = 9
    read(sequence, 10)
    assert sequences.enter("a", 11, alone=True).force is not None
    assert sequences.enter("a", 14, alone=True).force is None  # preempted and read again meanwhile
    sequence.position = 14
    read(sequence, 15)
    assert sequences.enter("a", 40, alone=False).force is None


def test_keys_are_those_of_the_pooler_whatever_the_pieces():
    """Blocks in any order, two sequences mixed, a block used again."""
    torch.manual_seed(0)
    keys = BlockKeys(8, 2, 6, 4, torch.device("cpu"), torch.float32)
    states = torch.randn(2, 2, 12, 6)  # sequence, layer, token
    tables = [[5, 2, 7], [1, 6, 3]]
    keys.add(torch.arange(20, 24), [torch.ones(4, 6), torch.ones(4, 6)])  # somebody before, in block 5
    keys.settle()
    for first, last in ((0, 3), (3, 4), (4, 11), (11, 12)):
        slots = [table[token // 4] * 4 + token % 4 for table in tables for token in range(first, last)]
        rows = [states[:, layer, first:last].reshape(-1, 6) for layer in range(2)]
        keys.add(torch.tensor([*slots, -1]), [torch.cat([part, torch.full((1, 6), 9.0)]) for part in rows])
    keys.settle()
    for sequence, table in enumerate(tables):
        pooler = KeyPooler(4)
        pooler.append(states[sequence])
        expected = pooler.pooled.transpose(0, 1)
        assert (keys.means(torch.tensor(table)).float() - expected).abs().max() < 2e-3


@pytest.mark.parametrize("seed", range(20))
def test_keys_that_wait_are_those_that_are_added_at_once(seed, monkeypatch):
    """Steps of any length, more than may wait too, and blocks that are somebody else's after a `settle`."""
    monkeypatch.setattr("eval.serving.vllm.keys.WAITING", 6)
    generator, used = torch.Generator().manual_seed(seed), 0
    wait, once = (BlockKeys(6, 2, 3, 4, torch.device("cpu"), torch.float32) for _ in range(2))
    for _ in range(12):
        tokens, left = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 4))
        slots = torch.arange(used, used + tokens) % 24
        keys = [torch.randn(tokens, 3, generator=generator) for _ in range(2)]
        wait.add(slots, keys)
        once.add(slots, keys)
        once.settle()
        used += tokens
        if left == 1:  # the next request takes its last block
            wait.settle()
            used = used // 4 * 4
    wait.settle()
    torch.testing.assert_close(wait.sums, once.sums)
    assert wait.sums[:6].abs().sum(dim=(1, 2)).gt(0).sum() >= 5, "most blocks hold something"


class Steps:
    """A worker without an engine: `step` reads tokens of requests into blocks, as vLLM says it in its metadata."""

    def __init__(self) -> None:
        self.worker = worker = object.__new__(Worker)
        worker.sequences, worker.counters, worker.memory, worker._leader = Sequences(), Counters(), None, None
        worker._left, worker._last, worker._slots, worker._plan = False, [], None, []
        worker.spec = SimpleNamespace(window=64, chunking=Chunking(tokens=4))
        worker.captured = SimpleNamespace(keys=[torch.zeros(32, 3)], hidden=[torch.zeros(32, 3)])
        worker.keys = BlockKeys(8, 1, 3, 4, torch.device("cpu"), torch.float32)
        worker.runner = SimpleNamespace(requests={}, input_batch=SimpleNamespace(req_ids=[]))
        worker._choose = lambda due: [  # everything that there is
            sequence.choose(Chosen(sequence.position, 0, torch.empty(0, dtype=torch.int64)), 0)
            for _, sequence, _ in due
        ]
        self.expected = torch.zeros(8, 3)

    def step(self, batch: dict[str, tuple[int, int, list[int]]], padding: int = 0) -> list[Chosen | None]:
        """batch: name -> (first token, tokens, blocks). Returns what rows read."""
        slots = [
            blocks[at // 4] * 4 + at % 4
            for first, count, blocks in batch.values()
            for at in range(first, first + count)
        ]
        counts = [count for _, count, _ in batch.values()] + [0] * padding
        self.worker.runner.requests = dict.fromkeys(batch)
        self.worker.runner.input_batch.req_ids = list(batch)
        read = self.worker.sets("builder", SimpleNamespace(
            num_reqs=len(counts), slot_mapping=torch.tensor(slots), is_prefilling=torch.tensor([n > 1 for n in counts]),
            query_start_loc_cpu=torch.tensor([0, *counts]).cumsum(0), block_table_tensor=torch.zeros(len(counts), 4),
            seq_lens_cpu_upper_bound=torch.tensor([first + n for first, n, _ in batch.values()] + [0] * padding),
        ))  # fmt: skip
        keys = torch.randn(len(slots), 3)
        self.worker.captured.keys[0][: len(slots)] = keys
        for slot, key in zip(slots, keys, strict=True):
            self.expected[slot // 4] = key + (self.expected[slot // 4] if slot % 4 else 0)
        return read

    def check(self) -> None:
        """All that was read is in the sums."""
        self.worker._take()
        self.worker.keys.settle()
        torch.testing.assert_close(self.worker.keys.sums[:8, 0], self.expected)


@pytest.mark.parametrize("second", ["b", "a"], ids=["another", "one of the same name"])
def test_a_block_that_changes_hands_in_one_step_has_its_new_owners_keys_alone(second):
    """The first request ends in the middle of a block, which the next one begins in the step after."""
    steps = Steps()
    steps.step({"a": (0, 5, [1, 2])})
    steps.step({"a": (5, 1, [1, 2]), "c": (0, 6, [5, 6])})
    steps.step({"a": (6, 1, [1, 2]), "c": (6, 1, [5, 6])})
    steps.step({second: (0, 3, [2]), "c": (7, 1, [5, 6])})
    steps.step({second: (3, 1, [2]), "c": (8, 1, [5, 6, 3])})
    steps.check()


def test_rows_of_no_request_read_nothing_and_hold_up_no_table():
    steps = Steps()
    assert steps.step({"a": (0, 5, [1, 2])}, padding=2) == [None, NOTHING, NOTHING]
    chosen, *rest = steps.step({"a": (5, 1, [1, 2])}, padding=1)
    assert chosen is not None and chosen is not NOTHING and rest == [NOTHING]
    tables = Tables(2, 2, 4, torch.device("cpu"))
    for length, first in ((5, 10), (6, 50)):
        bounds = torch.tensor([length, 0], dtype=torch.int32)
        tables.fill(first + torch.arange(4).view(2, 2).int(), bounds, bounds, [chosen, NOTHING])
    assert tables.table[0, 0] == 10, "not written again"


def test_tables_hold_visible_blocks_and_their_length():
    """Two requests with sets of 2 and 1 of their chunks: in places that they exchange, and whole again at last."""
    tables = Tables(4, 6, 4, torch.device("cpu"))
    table = torch.arange(18, dtype=torch.int32).view(3, 6)
    lengths = torch.tensor([18, 23, 24], dtype=torch.int32)
    moved = Chosen(20, 5, torch.tensor([0, 2]), torch.tensor([-1, 77], dtype=torch.int32))
    plain = Chosen(16, 4, torch.tensor([3]))
    for _ in range(2):
        short, new, bounds = tables.fill(table, lengths, lengths, [None, moved, plain])
        assert short[0].tolist() == table[0].tolist()
        assert short[1, :3].tolist() == [6, 77, 11]
        assert short[2, :3].tolist() == [15, 16, 17]
        assert new.tolist() == bounds.tolist() == [18, 11, 12]
        assert short.data_ptr() == tables.table.data_ptr()
    short, new, bounds = tables.fill(table, lengths, lengths, [plain, None, moved])
    assert (short[0, :3].tolist(), short[2, :3].tolist()) == ([3, 4, 5], [12, 77, 17])
    assert short[1].tolist() == table[1].tolist()
    assert new.tolist() == bounds.tolist() == [6, 23, 12]
    assert lengths.tolist() == [18, 23, 24]
    assert table.tolist() == torch.arange(18).view(3, 6).tolist()
    whole, new, bounds = tables.fill(table, lengths, lengths, [None] * 3)
    assert (whole.tolist(), new.tolist(), bounds.tolist()) == (table.tolist(), lengths.tolist(), lengths.tolist())


def test_a_table_grows_behind_a_set():
    """Chunks that are made after a set was chosen are read, without the set being told again."""
    tables, chosen = Tables(1, 8, 4, torch.device("cpu")), Chosen(11, 3, torch.tensor([0, 2]))
    table = torch.arange(8, dtype=torch.int32)[None] + 100
    for length in range(13, 32):
        lengths = torch.tensor([length], dtype=torch.int32)
        short, new, _ = tables.fill(table, lengths, lengths, [chosen])
        read = [chunk for chunk in range(-(-length // 4)) if chunk != 1]
        assert int(new) == length - 4
        assert short[0, : len(read)].tolist() == [100 + chunk for chunk in read]


def test_a_table_is_written_when_a_set_a_block_or_a_request_is_new_and_not_otherwise():
    tables = Tables(2, 4, 4, torch.device("cpu"))
    sets = [Chosen(11, 3, torch.tensor([0, 2])), Chosen(11, 3, torch.tensor([1]))]

    def fill(lengths, read, first):
        table = first + torch.arange(4 * len(read), dtype=torch.int32).view(-1, 4)
        bounds = torch.tensor(lengths, dtype=torch.int32)
        short, new, _ = tables.fill(table, bounds, bounds, read)
        return short[:, 0].tolist(), new.tolist()

    assert fill([13, 14], sets, 10) == ([10, 15], [9, 6])
    assert fill([14, 15], sets, 50) == ([10, 15], [10, 7]), "the engine moves no block under a set"
    assert fill([15, 17], sets, 50) == ([50, 55], [11, 9]), "a new block"
    assert fill([16, 18], sets[::-1], 50) == ([51, 54], [8, 14]), "requests that exchanged places"
    assert fill([16], sets[1:], 20) == ([21], [8]), "one that left"
    assert fill([5], [None], 30) == ([30], [5])
    assert fill([5], [None], 40) == ([40], [5]), "without a set nobody says whose row it is"


def pool(limit=1 << 20):
    """Two layers of 12 blocks; block b of layer l holds 100 l + b."""
    caches = [(100.0 * layer + torch.arange(12)).view(12, 1, 1).repeat(1, 2, 3) for layer in range(2)]
    return Memory(caches, limit)


def test_cold_chunks_leave_and_come_back_elsewhere():
    memory, table = pool(), torch.tensor([3, 4, 5, 6, 7, 8])
    memory.settle("a", {0, 3}, 4, table)
    assert memory.take_moves()["a"].evict == [1, 2]
    assert memory.of("a").visible(5)[0].tolist() == [0, 3, 4]
    for cache in memory.caches:
        cache[4:6] = -1  # freed, and somebody else's by now
    memory.settle("a", {0, 2}, 4, table)
    moves = memory.take_moves()["a"]
    assert (moves.evict, moves.fetch) == ([3], [2])
    assert memory.of("a").visible(5)[0].tolist() == [0, 4]  # 2 is on its way
    assert memory.load("a", {2: 10})
    assert memory.of("a").visible(5)[0].tolist() == [0, 2, 4]
    assert memory.of("a").visible(5)[1].tolist() == [-1, 10, -1]
    assert [cache[10].unique().tolist() for cache in memory.caches] == [[5.0], [105.0]]
    memory.settle("a", {0, 1}, 4, table)  # 2 is on the host already: nothing is copied again
    assert memory.take_moves()["a"].evict == [2]
    assert memory.used == 3 * memory.chunk_bytes
    memory.forget("a")
    assert memory.used == 0
    assert not memory.load("a", {1: 9})


def test_a_full_host_leaves_chunks_where_they_are():
    memory, table = pool(limit=2 * 2 * 6 * 4), torch.tensor([3, 4, 5, 6, 7, 8])
    memory.settle("a", {0}, 5, table)
    assert memory.take_moves()["a"].evict == [1, 2]
    assert memory.of("a").visible(5)[0].tolist() == [0, 3, 4]
    assert memory.full


def test_chunks_that_came_too_late_are_visible_until_the_next_set():
    memory, table = pool(), torch.tensor([3, 4, 5, 6])
    memory.settle("a", {0}, 3, table)
    memory.settle("a", {0, 1}, 3, table)
    memory.settle("a", {0, 2}, 3, table)
    memory.load("a", {1: 9})  # wanted by the set before
    assert memory.of("a").visible(3)[0].tolist() == [0, 1]
    memory.take_moves()
    memory.settle("a", {0, 2}, 3, table)
    assert memory.take_moves()["a"].evict == [1]


def test_only_what_came_back_is_counted():
    memory, table = pool(), torch.tensor([3, 4, 5, 6])
    memory.settle("a", {0}, 3, table)
    memory.load("a", {1: 9, 0: 10})  # 0 never left
    assert memory.fetched == 1


def test_versions():
    versions = ["0.25.1", "0.26.0", "0.28.0", "0.30.1rc1+cpu", "0.31.0", "1.28"]
    assert [version for version in versions if supported(version)] == ["0.26.0", "0.28.0", "0.30.1rc1+cpu"]


def test_a_model_without_groups_of_heads_is_compared_like_others():
    """Its configuration knows no number of key heads."""
    spec = IndexerSpec(
        shape=IndexerConfig(heads=2, rank=8), layers=[0], hidden=64, key_width=32, window=8, backbone="0123456789",
        chunking=Chunking(tokens=16, sink=1, recent=4), selections=[Budget(budget=0.1)],
    )  # fmt: skip
    cache = SimpleNamespace(block_size=16)
    engine = SimpleNamespace(cache_config=cache, model_config=SimpleNamespace(hf_text_config=GPT2Config()))
    with pytest.raises(InputError, match="but the model has 768 and 768"):
        check_shape(spec, engine)
