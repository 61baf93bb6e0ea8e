"""Shares of the work: every item is one worker's, whoever says which worker this is."""

import pytest
import torch

from data_gen.core.errors import InputError
from data_gen.core.shard import STARTERS, Shard


@pytest.fixture(autouse=True)
def _nobody_started_us(monkeypatch):
    for name in (name for names in STARTERS for name in names):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_every_item_is_exactly_one_workers(count):
    shards = [Shard.of(f"{index}/{count}") for index in range(count)]
    assert all(sum(shard.owns(number) for shard in shards) == 1 for number in range(50))


@pytest.mark.parametrize("names", STARTERS)
def test_whoever_starts_processes_says_which_this_is(monkeypatch, names):
    assert Shard.of(None) == Shard(0, 1)
    for name, value in zip(names, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert Shard.of(None) == Shard(5, 8, local=1) and str(Shard.of(None)) == "5/8"
    assert Shard.of("1/2") == Shard(1, 2)  # what is said counts more


@pytest.mark.parametrize("names", STARTERS)
@pytest.mark.parametrize(
    ("values", "wrong"),
    [(("a", "8", "1"), 0), (("5", "", "1"), 1), (("5", "8", "-1"), 2), (("8", "8", "1"), 0), (("0", "0", "0"), 0)],
)
def test_what_they_set_is_checked_like_an_option(monkeypatch, names, values, wrong):
    for name, value in zip(names, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"^{names[wrong]}={values[wrong]}: not .*; .* give --shard I/N$"):
        Shard.of(None)
    assert Shard.of("1/2") == Shard(1, 2)


def test_a_number_without_how_many_there_are_is_refused(monkeypatch):
    """It would trace every document, as all others would."""
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match=r"^WORLD_SIZE is not set, but RANK is; .* give --shard I/N$"):
        Shard.of(None)
    assert Shard.of("1/2") == Shard(1, 2)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for shard in (Shard(), Shard.of("1/8"), Shard.of("2/8"), Shard(7, 8), Shard(7, 8, local=0)):
        shard.use_own_gpu()
    assert used == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "1/0", "a/b", "1/2/3", "1 / 2"])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match="give I/N with I from 0 to N - 1"):
        Shard.of(text)
