"""How many processes make batches ahead."""

from types import SimpleNamespace

import pytest

from indexer_train.processes import workers

GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch):
    """Says what /dev/shm has free and how many ranks share it."""

    def set_up(free, ranks=None):
        monkeypatch.setattr("shutil.disk_usage", lambda path: {"/dev/shm": SimpleNamespace(free=free)}[path])
        if ranks is None:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return set_up


@pytest.mark.parametrize("asked", [0, 1, 5])
@pytest.mark.parametrize("cuda", [False, True])
def test_the_number_asked_for_wins(machine, asked, cuda):
    for free in (0, 100 * GIB):
        machine(free)
        assert workers(asked, cuda) == asked


def test_none_without_a_gpu(machine, caplog):
    for free in (0, 100 * GIB):
        machine(free)
        assert workers(None, cuda=False) == 0
    assert not caplog.records


@pytest.mark.parametrize(("ranks", "needed"), [(None, 4 * GIB), (1, 4 * GIB), (2, 8 * GIB), (8, 32 * GIB)])
def test_two_beside_a_gpu_when_all_ranks_find_memory_to_share(machine, caplog, ranks, needed):
    machine(needed, ranks)
    assert workers(None, cuda=True) == 2 and not caplog.records
    machine(needed - 1, ranks)
    assert workers(None, cuda=True) == 0
    assert f"/dev/shm has {(needed >> 20) - 1} MiB free of the {needed >> 20} that" in caplog.text


def test_none_where_there_is_no_memory_to_share_and_it_is_said(monkeypatch, caplog):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("shutil.disk_usage", missing)
    assert workers(None, cuda=True) == 0 and "/dev/shm cannot be read (/dev/shm)" in caplog.text
