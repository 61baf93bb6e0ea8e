"""Rules against brute force; windows read at once against decoding token by token; the whole command on one text."""

import json
import sys

import pytest
import torch

from benchmarks import coverage, results_tables
from benchmarks.coverage_rules import BUDGET, Rule, Scored, by_budget, by_coverage, by_threshold, limited
from data_gen.backbones.load import load_backbone
from data_gen.core.chunks import Chunking
from eval.online.cycle import Course, go_on
from eval.online.online_policies import indexer_policy
from eval.online.session import DenseSession
from indexer_train.config import IndexerConfig
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Coverage, Cut, Threshold
from indexer_train.spec import IndexerSpec
from recipes import load_recipe

RNG = torch.Generator().manual_seed(0)
WINDOWS = [
    Scored((torch.randn(count, generator=RNG) * spread).double().sort(descending=True).values, count + 9)
    for count in (1, 7, 60)
    for spread in (0.1, 1.0, 8.0)
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("reached", [0.2, 0.6, 0.95])
def test_coverage_keeps_the_fewest_chunks_that_reach_its_share(window, layers, reached):
    powers = [2.718281828459045 ** (float(score) / layers) for score in window.scores]
    reach = [sum(powers[:count]) / sum(powers) >= reached for count in range(len(powers) + 1)]
    assert by_coverage(window, reached, layers) == reach.index(True)


@pytest.mark.parametrize("window", WINDOWS)
def test_every_rule_counts_what_serving_selects(window):
    scores, position = window.scores.float()[None], torch.tensor([4 * window.visible - 1])
    cut = float(scores[0, len(window.scores) // 2])
    chosen = Threshold(cuts=[Cut(score=cut)]).choose(
        scores, torch.ones_like(scores, dtype=torch.bool), position, Chunking()
    )
    assert by_threshold(window, cut) == int(chosen.sum())
    chosen = Coverage(share=0.6).choose(scores, torch.ones_like(scores, dtype=torch.bool), position, Chunking())
    assert by_coverage(window, 0.6, 1) == int(chosen.sum())
    assert by_budget(window, 0.3) == Chunking(tokens=4).kept(0.3, int(position))


def test_limits_hold_whatever_a_rule_asks_for():
    for window in WINDOWS:
        counts = [limited(by_threshold, 0.1)(window, setting) for setting in (-1e4, 0.0, 1e4)]
        low, high = max(1, int(0.025 * window.visible)), max(1, int(0.4 * window.visible))
        assert counts[0] == min(high, len(window.scores)) and counts[-1] == low <= counts[1] <= high


@pytest.mark.parametrize(
    "rule", [BUDGET, Rule(by_threshold, 1e4, -1e4), Rule(lambda window, p: by_coverage(window, p, 1), 0.0, 1.0)]
)
def test_a_setting_comes_nearer_to_its_aim_than_any_other(rule):
    def measure(count, setting):
        return sum(count(window, setting) / window.visible for window in WINDOWS) / len(WINDOWS)

    others = torch.linspace(rule.fewest / 50, rule.most / 50, 101).tolist() + torch.linspace(0, 1, 101).tolist()
    for aim in (0.1, 0.4):
        gap = abs(measure(rule.count, rule.calibrated(measure, aim)) - aim)
        assert gap <= min(abs(measure(rule.count, other) - aim) for other in others) + 1e-9


@pytest.fixture(scope="module")
def reader(pocket, pocket_indexer):
    return coverage.Reader(pocket.backbone.model, pocket.tokenizer, pocket_indexer)


@pytest.fixture(scope="module")
def reads(reader, pocket):
    return list(reader.read(list(coverage.pocket_documents(pocket.tokenizer, 384, 1, "test"))))


def alike(reader, session, tokens, full):
    """Whether reading windows at once under a tenth is decoding token by token, and not full attention."""
    spec, score, seen = reader.indexer.spec, indexer_policy(reader.indexer), []
    course = Course(session.fork(), lambda each: each.best(score(each), 0.1), tokens,
                    watchers=[lambda _, logits: seen.append(logits)])  # fmt: skip
    go_on([course], spec.window)
    windows: list[Scored] = []
    found = reader.follow(session, tokens, lambda window: by_budget(window, 0.1), windows)
    kept = [by_budget(window, 0.1) + spec.chunking.recent + spec.chunking.sink for window in windows]
    assert [window.resident for window in course.windows] == kept
    torch.testing.assert_close(found, torch.stack(seen).float().log_softmax(dim=-1), atol=2e-3, rtol=1e-2)
    assert float((found - full[: len(tokens)]).abs().max()) > 0.01


def test_windows_read_at_once_are_decoding_token_by_token(reader, reads):
    for read in (reads[0], reads[-1]):
        alike(reader, read.session, read.tokens[:40], read.full)


def test_a_dense_model_is_asked_what_its_recipe_asks():
    recipe = load_recipe("debug")
    model, tokenizer = load_backbone(recipe.backbone)
    info, chunking = DenseSession(model, recipe.trace.chunking).host.info, recipe.trace.chunking
    torch.manual_seed(0)
    spec = IndexerSpec(
        shape=IndexerConfig(heads=2, rank=8), layers=info.full_layers[:2], hidden=info.hidden, key_width=info.key_width,
        chunking=chunking, window=32, backbone=info.fingerprint,
    )  # fmt: skip
    reader = coverage.Reader(model, tokenizer, MemoryIndexer.from_spec(spec, device=str(model.device)))
    documents = list(coverage.recipe_documents(recipe, tokenizer, 2048, 1, "development"))
    assert [asked.task for _, asked in documents] == coverage.TASKS
    (read,) = reader.read(documents[-1:])
    assert read.kind == "text" and len(read.tokens) == coverage.FOLLOWED and len(read.windows) == 4
    alike(reader, read.session, read.tokens, read.full)


def test_with_everything_kept_nothing_changes_and_every_fallback_is_full_attention(reader, reads):
    assert [read.kind for read in reads] == ["sparse", "sparse", "sparse", "dense", "text"]
    assert all(read.right for read in reads)
    for read in reads:
        told = reader.ask(read, lambda window: len(window.scores))
        assert told["kl"] == pytest.approx(0, abs=1e-5) and told.get("right", 1) == 1
    rows = coverage.fallen(reader, reads, {"all": (by_threshold, -1e4), "none": (by_threshold, 1e4)}, 0.01)
    found = {(row["kind"], row["rule"]): row for row in rows}
    for kind, count in (("sparse", 3), ("dense", 1)):
        assert found[kind, "all"]["right"] == found[kind, "all"]["fallbacks"] == count
        assert found[kind, "none"]["fallbacks"] == 0
        assert found[kind, "none"]["right"] == found[kind, "never"]["right"]
    assert found["dense", "never"]["right"] == 0, "six steps do not lie in one chunk"


def test_a_rule_that_is_a_budget_is_no_better_than_the_budget_beside_it(reader, reads):
    rows = coverage.compared(reader, reads, {"same": (by_budget, 0.2)}, 0.05)
    assert {(row["kind"], row["rule"]) for row in rows} == {
        (kind, rule) for kind in ("sparse", "dense", "text") for rule in ("budget", "same")
    }
    for row in rows:
        assert row["kept"] == pytest.approx(row["kept_of_budget"]) and row["kl_beside"][0] == pytest.approx(0)
    text = {row["rule"]: row for row in rows if row["kind"] == "text"}
    assert text["same"]["kept"] > 3 * text["budget"]["kept"] and "right" not in text["same"]


def test_the_command_writes_its_part_and_the_page_shows_it(tmp_path, monkeypatch, capsys):
    output = tmp_path / "coverage.json"
    output.write_text(json.dumps({"other": {"origin": {}}}))
    arguments = ["--bundle", "recipes/pocket_v4/bundle", "--share", "0.05", "--calibrate", "300", "--length", "384"]
    monkeypatch.setattr(sys, "argv", ["coverage", "small", *arguments, "--texts", "1", "--output", str(output)])
    coverage.main()
    found = json.loads(output.read_text())
    assert found["other"] == {"origin": {}} and found["small"]["origin"]["commit"]
    rules = {row["rule"] for row in found["small"]["rows"]}
    assert rules == {"budget", "threshold", "coverage", "sharp coverage"}
    printed, tables = capsys.readouterr().out, results_tables.coverage({"small": found["small"]})
    assert all(table in printed for table in tables) and tables[0].count("\n| 384") == 3 * len(rules)
