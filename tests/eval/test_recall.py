"""Recall against a slow, literal reading of the definitions."""

import pytest
import torch

from data_gen.oracle import WindowLabels
from eval.policies import mean_pooled, oracle, random, recency
from eval.recall import BUDGETS, as_rows, evaluate_recall
from eval.report import plot_recall, recall_table
from indexer_train.config import IndexerConfig
from indexer_train.metrics import golden_recall, mass_recall, served_windows
from indexer_train.model import IndexerSpec, MemoryIndexer
from indexer_train.scoring import above, select


@pytest.fixture(scope="module")
def indexer(stores):
    manifest = stores[1].manifest
    torch.manual_seed(0)
    return MemoryIndexer.from_spec(
        IndexerSpec(
            shape=IndexerConfig(heads=4, rank=8),
            layers=manifest.trace.layers,
            hidden=manifest.backbone.hidden,
            key_width=manifest.backbone.key_width,
            chunking=manifest.trace.chunking,
            window=manifest.trace.window,
            backbone=manifest.backbone.fingerprint,
        ),
        device="cpu",
    )


def test_metrics_by_hand():
    labels = WindowLabels(
        mass=torch.tensor([[0.0, 0.3, 0.1, 0.0]]),
        peak=torch.tensor([[0.0, 0.2, 0.06, 0.01]]),
        candidate=torch.tensor([[False, True, True, True]]),
        rest=torch.tensor([0.1]),
    )
    selected = torch.tensor([[False, True, False, False]])
    torch.testing.assert_close(mass_recall(selected, labels), torch.tensor([0.6]))
    torch.testing.assert_close(golden_recall(selected, labels, 0.05), torch.tensor([0.5]))
    assert golden_recall(selected, labels, 0.5).isnan().all()


def test_selection_respects_candidates_ties_and_counts():
    scores = torch.tensor([[9.0, 1.0, 5.0, 5.0, 7.0]])
    candidate = torch.tensor([[False, True, True, True, False]])
    assert select(scores, candidate, torch.tensor([2])).tolist() == [[False, False, True, True, False]]
    assert select(scores, candidate, torch.tensor([1])).tolist() == [[False, False, True, False, False]]
    assert select(scores, candidate, torch.tensor([9])).tolist() == candidate.tolist()
    assert above(scores, candidate, 5.0).tolist() == [[False, False, True, True, False]]


def test_rows_are_means_over_documents(stores, indexer):
    rows = {(r.policy, r.task, r.budget): r for r in evaluate_recall(indexer, stores[1], 0.05, threshold=0.0)}
    for name, policy in {"oracle": oracle, "mean_pooled": mean_pooled, "recency": recency, "random": random}.items():
        for budget in BUDGETS:
            masses = {"text": [], "multi_value": []}
            for served in served_windows(stores[1]):
                scores, recalls = policy(served), []
                for window, position in enumerate(served.positions.tolist()):
                    first, last = served.document.trace.chunking.candidates(position)
                    count = max(1, int(budget * ((position + 1) // 4)))
                    ranked = sorted(range(first, last), key=lambda c: (-float(scores[window, c]), c))[:count]
                    mass = served.labels.mass[window]
                    recalls.append(float(mass[ranked].sum() / (mass.sum() + served.labels.rest[window])))
                masses[served.document.meta.task].append(sum(recalls) / len(recalls))
            for task, values in masses.items():
                row = rows[name, task, budget]
                assert row.documents == 2
                assert abs(row.mass_recall - sum(values) / 2) < 1e-5


def test_the_oracle_bounds_every_policy(stores, indexer):
    rows = [r for r in evaluate_recall(indexer, stores[1], 0.05, threshold=0.0) if isinstance(r.budget, float)]
    best = {(r.task, r.budget): r.mass_recall for r in rows if r.policy == "oracle"}
    assert all(r.mass_recall <= best[r.task, r.budget] + 1e-6 for r in rows)
    assert {r.policy for r in rows} == {"oracle", "indexer", "mean_pooled", "recency", "random"}


def test_report_shows_every_policy(stores, indexer, tmp_path):
    rows = as_rows(evaluate_recall(indexer, stores[1], 0.05, threshold=0.0))
    text = recall_table(rows)
    assert all(policy in text for policy in ("oracle", "indexer", "mean_pooled", "recency", "random"))
    plot_recall(rows, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
