"""The definitions of the metrics: by hand, against each other, and against a plain count."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_gen.traces.labels import WindowLabels
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import Tally, golden_recall, mass_recall, peak_entropy, ranked_tally, tally
from indexer_train.scoring import above, ranking, select


def by_hand():
    labels = WindowLabels(
        mass=torch.tensor([[0.0, 0.3, 0.1, 0.0]]),
        peak=torch.tensor([[0.0, 0.2, 0.06, 0.01]]),
        candidate=torch.tensor([[False, True, True, True]]),
        rest=torch.tensor([0.1]),
    )
    return labels, torch.tensor([[False, True, False, True]])


def test_every_metric_by_hand():
    labels, selected = by_hand()
    found = tally(selected, labels, 0.05, torch.tensor([5])).ratios()
    expected = {
        "mass_recall": 0.6,
        "golden_recall": 0.5,
        "precision": 0.5,
        "f1": 0.5,
        "kept": 0.4,
        "resident_mass": 0.8,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(float(found[name]) - value) < 1e-6, name
    torch.testing.assert_close(mass_recall(selected, labels), torch.tensor([0.6]))
    torch.testing.assert_close(golden_recall(selected, labels, 0.05), torch.tensor([0.5]))
    nothing_golden = tally(selected, labels, 0.5, torch.tensor([5]))
    assert nothing_golden.golden_recall.isnan() and nothing_golden.precision == nothing_golden.f1 == 0


def test_peak_entropy_by_hand_is_least_where_the_scores_are_the_peaks():
    labels, _ = by_hand()
    target = np.array([0.2, 0.06, 0.01]) / 0.27
    scores = torch.tensor([[9.0, 1.0, 3.0, 2.0]])  # the first is no candidate
    chance = np.exp([1.0, 3.0, 2.0]) / np.exp([1.0, 3.0, 2.0]).sum()
    torch.testing.assert_close(peak_entropy(scores, labels), torch.tensor([-(target * np.log(chance)).sum()]).float())
    least = peak_entropy(labels.peak.clamp_min(1e-9).log(), labels)
    torch.testing.assert_close(least, torch.tensor([-(target * np.log(target)).sum()]).float())
    nothing = WindowLabels(labels.mass, torch.zeros(1, 4), labels.candidate, labels.rest)
    assert peak_entropy(scores, nothing).isnan().all()


def test_macro_and_micro_differ_where_windows_differ():
    labels = WindowLabels(
        mass=torch.tensor([[0.4, 0.0], [0.05, 0.05]]),
        peak=torch.tensor([[0.4, 0.0], [0.05, 0.05]]),
        candidate=torch.ones(2, 2, dtype=torch.bool),
        rest=torch.zeros(2),
    )
    found = tally(torch.tensor([[True, False], [True, False]]), labels, 0.05, torch.tensor([2, 2]))
    assert abs(float(found.mass_recall.mean()) - 0.75) < 1e-6  # (1 + 1/2) / 2
    assert abs(float(found.total().mass_recall) - 0.9) < 1e-6  # 0.45 / 0.5
    assert abs(float(found.total().golden_recall) - 2 / 3) < 1e-6
    assert float(Tally.concatenate([found.total(), found.total()]).total().windows) == 4


def test_selection_respects_candidates_ties_and_counts():
    scores = torch.tensor([[9.0, 1.0, 5.0, 5.0, 7.0]])
    candidate = torch.tensor([[False, True, True, True, False]])
    assert select(scores, candidate, torch.tensor([2])).tolist() == [[False, False, True, True, False]]
    assert select(scores, candidate, torch.tensor([1])).tolist() == [[False, False, True, False, False]]
    assert select(scores, candidate, torch.tensor([9])).tolist() == candidate.tolist()
    assert above(scores, candidate, 5.0).tolist() == [[False, False, True, True, False]]


@given(st.integers(0, 2**32 - 1))
def test_the_ranking_is_a_stable_argsort(seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 40, generator=rng).mul(2).round() * torch.tensor([[1.0], [-0.0], [1e-3]])  # ties, -0
    scores[0, :3] = torch.tensor([1e38, -1e38, torch.inf])
    candidate = torch.rand(3, 40, generator=rng) < 0.8
    expected = scores.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(ranking(scores, candidate), expected)


@given(st.integers(0, 2**32 - 1))
def test_one_ranking_gives_what_selecting_cut_by_cut_gives(seed):
    rng = torch.Generator().manual_seed(seed)
    candidate = torch.rand(4, 30, generator=rng) < 0.7
    mass = torch.rand(4, 30, generator=rng) * candidate
    labels = WindowLabels(mass, mass.square(), candidate, torch.rand(4, generator=rng))
    scores = torch.randn(4, 30, generator=rng).mul(2).round()  # ties
    counts, visible = torch.randint(0, 40, (4, 3), generator=rng), torch.full((4,), 33)
    ranked = ranked_tally(scores, labels, 0.4, visible, counts)
    for cut in range(3):
        single = tally(select(scores, candidate, counts[:, cut]), labels, 0.4, visible)
        for name, value in vars(single).items():
            torch.testing.assert_close(getattr(ranked, name)[:, cut], value)


def test_intervals_cover_the_mean_they_estimate():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.normal(0.5, 0.2, size=(30, 1))
        mean, low, high = bootstrap_means(values)
        assert low[0] <= mean[0] <= high[0]
        covered += low[0] <= 0.5 <= high[0]
    assert 175 <= covered <= 200  # 95 % of 200, less what 30 documents cost


def test_pairs_are_told_apart_where_separate_intervals_overlap():
    rng = np.random.default_rng(1)
    hard = rng.normal(0.5, 0.3, size=40)  # documents differ a lot
    ours, theirs = hard + 0.03 + rng.normal(0, 0.02, 40), hard + rng.normal(0, 0.02, 40)
    _, low, high = bootstrap_means(np.stack([ours, theirs], axis=1))
    assert low[0] < high[1]
    mean, low, _ = bootstrap_means((ours - theirs)[:, None])
    assert abs(mean[0] - (ours - theirs).mean()) < 1e-12 and low[0] > 0


def test_documents_without_a_value_are_left_out_and_one_has_no_interval():
    values = np.array([[1.0, np.nan, np.nan], [0.0, 0.5, np.nan]])
    mean, low, high = bootstrap_means(values)
    assert mean[0] == 0.5 and mean[1] == 0.5 and np.isnan(mean[2])
    assert low[0] == 0.0 and high[0] == 1.0 and np.isnan(low[1]) and np.isnan(high[2])
