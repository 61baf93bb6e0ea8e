"""Demand fallback end to end on the trained pocket model: the windows that ask for more than the cap are answered as
full attention answers them, the others are not touched."""

import pytest
import torch

from benchmarks.fallback import DENSE, SPARSE, as_table, measure, questions, separating
from data_gen.core.chunks import Chunking
from indexer_train.config import IndexerConfig
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.selection import Coverage, Cut, Threshold

CAP = 9


@pytest.fixture(scope="module")
def indexer(pocket):
    """Untrained: which question asks for more is arbitrary, what follows from it is not."""
    info = pocket.backbone.info
    torch.manual_seed(3)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=4, rank=8, distance_bumps=0, scale=False, slot=False, join="max"),
        layers=[0, 1, 2], hidden=info.hidden, key_width=info.key_width, window=64, key=info.key,
        chunking=Chunking(tokens=4, sink=0, recent=1), backbone=info.fingerprint, rope=info.rope,
    )  # fmt: skip
    return MemoryIndexer.from_spec(spec).eval()


@pytest.fixture(scope="module")
def asked():
    """One text of 384 tokens, a dense and a sparse question."""
    return questions(384, 1, "test")


def test_dense_questions_fail_under_the_cap_and_are_right_with_fallback(pocket, indexer, asked):
    never = [Threshold(cuts=[Cut(score=1e9)]), Coverage(share=1e-9)]
    undemanding = MemoryIndexer.from_spec(indexer.spec.model_copy(update={"selections": never}))
    asks_all = Threshold(cuts=[Cut(score=-1e9)])
    rows = measure(pocket.backbone.model, pocket.tokenizer, undemanding, asked, CAP, asks_all, Coverage(share=1.0))
    found = {(row["setting"], row["task"]): row for row in rows}
    full, capped, fallen = (found[name, DENSE] for name in ("full attention", "cap", "cap + fallback"))
    assert (full["right"], capped["right"], fallen["right"], found["cap + fallback", SPARSE]["right"]) == (1, 0, 1, 1)
    assert (full["fallbacks"], capped["fallbacks"], fallen["fallbacks"], fallen["windows"]) == (0, 0, 1, 1)
    assert full["resident_share"] == fallen["resident_share"] == 1 and 0.09 < capped["resident_share"] < 0.11
    assert fallen["bytes_per_token"] == full["bytes_per_token"] > 9 * capped["bytes_per_token"]
    for name in ("fallbacks", "right", "bytes_per_token", "demand"):
        assert found["cap + fallback by coverage", DENSE][name] == fallen[name]
    for by, demand in (("threshold", 0), ("coverage", 1)):
        undemanded = found[f"cap + fallback, bundle's {by}", DENSE]
        assert (undemanded["fallbacks"], undemanded["demand"], undemanded["right"]) == (0, demand, 0)
    assert "1 of 1" in as_table(rows)


@pytest.mark.parametrize("setting", ["cap + fallback", "cap + fallback by coverage"])
def test_a_rule_for_half_of_the_questions_lets_half_of_them_fall_back(pocket, indexer, asked, setting):
    model, tokenizer = pocket.backbone.model, pocket.tokenizer
    rows = measure(model, tokenizer, indexer, asked, CAP, *separating(model, tokenizer, indexer, asked, CAP, 0.5))
    full, fallback = (
        {row["task"]: row for row in rows if row["setting"] == name} for name in ("full attention", setting)
    )
    (fallen,) = (task for task, row in fallback.items() if row["fallbacks"])
    (kept,) = {DENSE, SPARSE} - {fallen}
    assert fallback[fallen]["demand"] + 1 > CAP >= fallback[kept]["demand"] + 1
    assert fallback[fallen]["bytes_per_token"] == full[fallen]["bytes_per_token"]
    assert fallback[kept]["resident_share"] == pytest.approx(CAP / full[kept]["demand"], abs=0.02)
