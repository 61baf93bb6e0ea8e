"""Thresholds and coverages against brute force over every possible one, and budgets beside them."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data_gen.core.chunks import Chunking
from data_gen.core.errors import InputError
from indexer_train.formats.bundle import export_bundle, load_bundle
from indexer_train.load import load_indexer
from indexer_train.measure.calibration import ScoredWindows, calibrate, calibrate_coverage, score_windows, task_mean
from indexer_train.measure.metrics import mass_recall, served_windows
from indexer_train.measure.reliability import calibrate_folder, calibration_error, reliability
from indexer_train.model import MemoryIndexer
from indexer_train.selection import Budget, Coverage, Cut, Selection, Threshold, served_first
from indexer_train.training.evaluator import MassRecallEvaluator
from indexer_train.training.trainer import train


@pytest.fixture(scope="module")
def trained(stores, tiny_recipe, tmp_path_factory):
    """(folder, indexer) trained on the tiny stores."""
    out = tmp_path_factory.mktemp("trained")
    return out / "indexer", train(stores[0], tiny_recipe.indexer, tiny_recipe.train, out)


@pytest.fixture(scope="module", params=["trained", "coarse"])
def scored(request, trained, stores):
    """Scored held-out windows; `coarse`: so rounded that many chunks tie."""
    found = score_windows(trained[1], served_windows(stores[1]))
    if request.param == "coarse":
        return [ScoredWindows(each.served, each.scores.mul(2).round()) for each in found]
    return found


def mean(scored, selection, name):
    return task_mean(scored, [each.means(selection, 0.05)[name] for each in scored])[""]


@pytest.fixture(scope="module")
def brute(scored):
    """Means by name -> (threshold, mean) for every score that occurs."""
    found = {"kept": [], "mass_recall": []}
    for score in torch.cat([each.scores[each.served.labels.candidate] for each in scored]).unique().tolist():
        means = [each.means(Threshold(cuts=[Cut(score=score)]), 0.05) for each in scored]
        for name, rows in found.items():
            rows.append((score, task_mean(scored, [row[name] for row in means])[""]))
    return found


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.3, 1.0])
def test_a_budget_threshold_is_the_lowest_that_keeps_no_more(scored, brute, share):
    found = calibrate(scored, "budget", share).cuts[0].score
    within = [score for score, kept in brute["kept"] if kept <= share + 1e-9]
    highest = max(score for score, _ in brute["kept"])
    assert found == min(within, default=highest)


@pytest.mark.parametrize("recall", [0.05, 0.3, 0.6, 0.9])
def test_a_recall_threshold_is_the_highest_that_reaches_it(scored, brute, recall):
    found = calibrate(scored, "recall", recall).cuts[0].score
    assert found == max(score for score, reached in brute["mass_recall"] if reached >= recall - 1e-9)


def test_a_recall_that_no_set_has_is_refused(scored):
    with pytest.raises(InputError, match="cannot be reached"):
        calibrate(scored, "recall", 1.01)


@pytest.fixture(scope="module")
def shares(scored):
    """Means by name -> (share, mean) for a coverage of every number of chunks that some window reaches."""
    reached = {1.0}
    for each in scored:
        for scores, candidate in zip(each.scores.double(), each.served.labels.candidate, strict=True):
            covered = scores[candidate].sort(descending=True).values.softmax(dim=0).cumsum(dim=0)
            reached |= set((covered[:-1]).round(decimals=9).tolist()[::7])
    ends = sorted(share for share in reached if 0 < share <= 1)
    found = {"kept": [], "mass_recall": []}
    for share in ends[:: max(1, len(ends) // 150)]:
        for name, rows in found.items():
            rows.append((share, mean(scored, Coverage(share=share), name)))
    return found


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.3, 1.0])
def test_a_budget_coverage_is_the_largest_that_keeps_no_more(scored, shares, share):
    found = calibrate_coverage(scored, "budget", share)
    kept = mean(scored, found, "kept")
    least = mean(scored, Coverage(share=1e-12), "kept")
    assert kept <= max(share, least) + 1e-9 and (found.target, found.value) == ("budget", share)
    assert kept >= max((other for _, other in shares["kept"] if other <= share + 1e-9), default=least) - 1e-9
    more = [other for each, other in shares["kept"] if each > found.share and other > kept + 1e-9]
    assert all(other > share for other in more)


@pytest.mark.parametrize("recall", [0.05, 0.3, 0.6, 0.9])
def test_a_recall_coverage_is_the_least_that_reaches_it(scored, shares, recall):
    found = calibrate_coverage(scored, "recall", recall)
    reached = mean(scored, found, "mass_recall")
    assert reached >= recall - 1e-9
    assert all(other < recall for each, other in shares["mass_recall"] if each < found.share and other < reached - 1e-9)
    with pytest.raises(InputError, match="cannot be reached"):
        calibrate_coverage(scored, "recall", 1.01)


@pytest.mark.parametrize("sharper", [30, 100, 1e4])
def test_a_sharp_coverage_keeps_no_more_than_asked_where_fp64_ends(scored, sharper):
    """Nearly all of the softmax lies on few chunks of each window, and what is left is below 1e-16 or is nothing."""
    sharp = [ScoredWindows(each.served, each.scores * sharper) for each in scored]
    found = calibrate_coverage(sharp, "budget", 0.3)
    assert found.share > 0.9 and 0 < mean(sharp, found, "kept") <= 0.3
    assert found == Coverage.model_validate_json(found.model_dump_json())


def test_lengths_get_scores_of_their_own(scored):
    lengths = torch.cat([each.served.positions + 1 for each in scored])
    middle = int(lengths.median())
    found = calibrate(scored, "budget", 0.2, [middle])
    assert [cut.longest for cut in found.cuts] == [middle, None]
    for part, cut in zip((lengths <= middle, lengths > middle), found.cuts, strict=True):
        assert torch.equal(found.scores(lengths[part] - 1), torch.full((int(part.sum()),), cut.score))
    for inside in (lambda each: each.served.positions + 1 <= middle, lambda each: each.served.positions + 1 > middle):
        kept = [each.means(found, 0.05)["kept"].masked_fill(~inside(each), torch.nan) for each in scored]
        assert task_mean(scored, kept)[""] <= 0.2 + 1e-9
    beyond = calibrate(scored, "budget", 0.2, [int(lengths.max())])
    assert beyond.cuts == calibrate(scored, "budget", 0.2).cuts
    with pytest.raises(InputError, match="no held-out window"):
        calibrate(scored, "budget", 0.2, [3])


def test_the_mean_is_over_windows_then_documents_then_tasks(scored):
    values = [torch.arange(len(each.scores)).float() + place for place, each in enumerate(scored)]
    values[0][0] = torch.nan
    tasks = {}
    for each, value in zip(scored, values, strict=True):
        tasks.setdefault(each.served.document.meta.task, []).append(float(value.nanmean()))
    found = task_mean(scored, values)
    for task, documents in tasks.items():
        assert found[task] == pytest.approx(sum(documents) / len(documents))
    assert found[""] == pytest.approx(sum(found[task] for task in tasks) / len(tasks))


@given(st.lists(st.integers(1, 40), max_size=4, unique=True), st.integers(0, 60))
def test_the_cut_of_a_length_is_the_first_that_reaches_it(ends, length):
    ends = sorted(ends)
    cuts = [Cut(longest=end, score=float(number)) for number, end in enumerate(ends)] + [Cut(score=99.0)]
    expected = next((cut.score for cut in cuts[:-1] if length <= cut.longest), 99.0)
    assert float(Threshold(cuts=cuts).scores(torch.tensor([length - 1]))) == expected


def test_selections_are_checked_and_survive_json():
    both = [Budget(budget=0.1), Threshold(target="recall", value=0.9, cuts=[Cut(longest=9, score=1), Cut(score=0.5)])]
    both.append(Coverage(target="budget", value=0.1, share=0.9094897987))
    adapter = TypeAdapter(list[Selection])
    assert adapter.validate_json(adapter.dump_json(both)) == both
    for cuts in (
        [Cut(longest=9, score=1)],
        [Cut(score=1), Cut(score=2)],
        [Cut(longest=9, score=1)] * 2 + [Cut(score=0)],
    ):
        with pytest.raises(ValidationError, match="ascend"):
            Threshold(cuts=cuts)
    assert served_first(Budget(budget=0.2), both) == [Budget(budget=0.2), *both[1:]]
    assert served_first(both[1], both) == [both[1], both[0], both[2]]
    again = Coverage(target="budget", value=0.1, share=0.5)
    assert served_first(again, both) == [again, *both[:2]]
    assert served_first(Coverage(share=0.5), both) == [Coverage(share=0.5), *both]
    assert str(both[2]) == "the best chunks up to a predicted share of 0.90949 (to keep 10.0%)"


def test_a_score_equal_to_the_threshold_is_selected():
    scores, candidate = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    chosen = Threshold(cuts=[Cut(score=2.0)]).choose(scores, candidate, torch.tensor([15]), Chunking(tokens=4))
    assert chosen.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("select", ["budget", "threshold", "coverage"])
def test_checkpoints_are_chosen_by_what_is_served(stores, tiny_recipe, tmp_path, select):
    settings = tiny_recipe.train.model_copy(update={"select": select})
    indexer = train(stores[0], tiny_recipe.indexer, settings, tmp_path)
    _, validation = stores[0].hold_back(settings.validation_every)
    scored = score_windows(indexer, served_windows(validation))
    served = indexer.spec.selection
    assert served.by == select and {each.by for each in indexer.spec.selections} == {"budget", "threshold", select}
    recall = task_mean(scored, [mass_recall(each.choose(served), each.served.labels) for each in scored])[""]
    assert MassRecallEvaluator(validation, settings.budget, select)(indexer)["mass_recall"] == recall
    states = (tmp_path / "checkpoints").glob("*/trainer_state.json")
    assert max(json.loads(path.read_text())["best_metric"] for path in states) == pytest.approx(recall)


def test_what_calibrate_finds_is_stored_and_exported(trained, stores, tmp_path):
    folder, _ = trained
    loaded = load_indexer(folder)
    found = calibrate_folder(folder, loaded, stores[1], 0.05, ("recall", 0.8), [440])
    saved = load_indexer(folder)
    assert saved.spec == loaded.spec and saved.spec.selection.target == "recall" and found.beyond is None
    assert [cut.longest for cut in saved.spec.selection.cuts] == [440, None]
    assert {row["tokens up to"] for row in found.rows} == {440, "any"}
    assert all(row["mass_recall"] >= 0.8 - 1e-6 for row in found.rows if row["selection"] == str(saved.spec.selection))
    assert found.plot.read_bytes().startswith(b"\x89PNG") and found.error is None  # of a loss that trains an order
    assert str(saved.spec.selection) in (folder / "README.md").read_text()
    export_bundle(saved, tmp_path)
    assert load_bundle(tmp_path).spec.selection == saved.spec.selection
    found = calibrate_folder(folder, saved, stores[1], 0.05, ("budget", 0.2), [440, 512])
    assert found.beyond == 512 and [cut.longest for cut in saved.spec.selection.cuts] == [440, None]
    saved.spec.provenance.train["loss"] = "focal"
    found = calibrate_folder(folder, saved, stores[1], 0.05, ("budget", 0.2), [], by="budget")
    assert 0 <= found.error <= 1
    again = load_indexer(folder).spec
    assert again.selection == Budget(budget=0.2) and len(again.selections) == 4
    kept = [(each.target, each.value) for each in again.selections if isinstance(each, Threshold)]
    assert ("budget", 0.2) in kept


@pytest.mark.parametrize("target", [("budget", 0.2), ("recall", 0.8)])
def test_a_coverage_is_stored_and_exported(trained, stores, tmp_path, target):
    shutil.copytree(trained[0], tmp_path / "indexer")
    loaded = load_indexer(tmp_path / "indexer")
    before = loaded.spec.selections
    found = calibrate_folder(tmp_path / "indexer", loaded, stores[1], 0.05, target, [], by="coverage")
    saved = load_indexer(tmp_path / "indexer").spec
    served, beside, *others = saved.selections
    assert (served.by, beside.by) == ("coverage", "threshold") and {each.by for each in others} <= {
        "budget",
        "threshold",
    }
    assert (served.target, served.value) == (beside.target, beside.value) == target and len(before) <= len(others) + 1
    (row,) = [row for row in found.rows if row["selection"] == str(served)]
    assert row["kept"] <= 0.2 + 1e-9 if target[0] == "budget" else row["mass_recall"] >= 0.8 - 1e-6
    assert str(served) in (tmp_path / "indexer" / "README.md").read_text()
    assert any(metric.selection == str(served) for metric in saved.provenance.metrics)
    export_bundle(loaded, tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").spec.selection == served


def test_training_traces_are_no_ground_for_a_threshold(trained, stores):
    with pytest.raises(InputError, match="training documents"):
        calibrate_folder(trained[0], trained[1], stores[0], 0.05, ("budget", 0.1), [])


def test_reliability_of_a_score_that_is_the_truth(scored):
    labels = [each.served.labels for each in scored]
    truth = torch.cat([each.golden(0.05)[each.candidate] for each in labels])
    sure = torch.where(truth, 40.0, -40.0)
    assert calibration_error(reliability(sure, truth)) < 1e-6
    assert calibration_error(reliability(-sure, truth)) > 0.9
    assert sum(each.chunks for each in reliability(sure, truth)) == len(truth)


def test_indexers_without_any_are_served_as_in_the_paper(trained):
    bare = trained[1].spec.model_copy(update={"selections": []})
    assert bare.selection == Threshold(cuts=[Cut(score=0.0)])
    assert MemoryIndexer.from_spec(bare, device="cpu").spec.selections == []
