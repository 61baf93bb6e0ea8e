"""All sections of an evaluation: bins, comparison, one document's timeline, and what it refuses."""

import copy
import shutil
import weakref
from collections import Counter

import pytest
import torch

from benchmarks.evaluate_gpu import figures
from data_gen.core.errors import InputError
from data_gen.core.files import read_sealed, write_sealed
from data_gen.traces.store import TraceStore
from data_gen.traces.types import DocumentMeta
from eval.offline.evaluation import (
    Evaluation,
    depth_bin,
    evaluate,
    length_bins,
    sample_candidates,
    threshold_for,
    unseen_notes,
)
from eval.offline.refresh import timeline
from indexer_train.measure.metrics import DocumentScorer, served_windows
from indexer_train.selection import Budget, Coverage, Cut, Threshold
from indexer_train.spec import Provenance, Source
from tests.data_gen.traces.spread import spread
from tests.eval.conftest import planted_indexer
from tests.second_device import GPU, SecondDevice, bring, there

GOLDEN = 0.05


@pytest.fixture(scope="module")
def compared(stores, indexer, other):
    return evaluate({"A": indexer, "B": other}, stores[1], GOLDEN, 0.1)


def meta(length, depth=None):
    return DocumentMeta(name="", task="", length=length, spans=[], depth=depth)


def test_bins_hold_every_document_once():
    names, name = length_bins([1000, 1500, 2000])
    assert len(names) == 4
    assert [name(meta(n)) for n in (1000, 1249, 1250, 2000)] == ["1,000-1,250"] * 2 + ["1,250-1,500", "1,750-2,000"]
    assert length_bins([700, 700])[1](meta(700)) == "700"
    assert [depth_bin(meta(1, d)) for d in (0.0, 0.19, 0.2, 1.0)] == ["0%-20%", "0%-20%", "20%-40%", "80%-100%"]


def test_cells_of_depth_and_length_add_up(stores, compared):
    needles = [document for document in stores[1] if document.meta.depth is not None]
    assert sum(row.documents for row in compared["heat"]) == len(needles)
    first = [row for row in compared["by_length"] if (row.policy, row.budget) == ("A", 0.1)]
    assert sum(row.documents for row in first) == len(stores[1].paths())


def test_two_indexers_are_compared_document_by_document(compared):
    recall = {(r.policy, r.task, r.budget): r for r in compared["recall"]}
    row = next(r for r in compared["comparison"] if (r.task, r.budget, r.metric) == ("text", 0.1, "mass_recall"))
    assert pytest.approx(recall["A", "text", 0.1].mass_recall) == row.A
    assert pytest.approx(recall["B", "text", 0.1].mass_recall) == row.B
    assert row.difference == pytest.approx(row.A - row.B)
    assert row.low <= row.difference <= row.high and row.documents == 2
    assert row.A != row.B


def test_an_indexer_beside_itself_differs_nowhere(stores, indexer):
    rows = evaluate({"A": indexer, "B": indexer}, stores[1], GOLDEN, 0.1)["comparison"]
    assert rows and all(row.difference == 0 for row in rows)


def test_the_timeline_shows_what_serving_kept_and_missed(stores, indexer):
    found = timeline(indexer, stores[1], GOLDEN, 0.1)
    document = next(d for d in stores[1] if d.meta.name == found.document)
    (served,) = served_windows([document])
    scores = DocumentScorer(indexer, served.document).joined_scores(served)
    peak = spread(document.oracle)[1]
    needed = []
    for row, (window, (first, last)) in enumerate(zip(found.windows, served.windows.tolist(), strict=True)):
        start, stop = served.chunking.candidates(int(document.positions[first]))
        count = served.chunking.kept(0.1, int(document.positions[first]))
        best = sorted(range(start, stop), key=lambda c: (-float(scores[row, c]), c))
        assert window.candidates == (start, stop) and window.kept == sorted(best[:count])
        assert window.ranks[best[0]] == 100 and window.ranks[best[-1]] == -(-100 // (stop - start))
        for token in range(first, last):
            for chunk in range(start, stop):
                if peak[token, chunk] >= GOLDEN:
                    needed.append((int(document.positions[token]), chunk, int(chunk in window.kept)))
    assert found.needed == needed and needed


def test_reliability_bins_hold_every_candidate(compared, stores):
    count = sum(int(served.labels.candidate.sum()) for served in served_windows(stores[1]))
    bins = compared["reliability"]
    assert sum(each.chunks for each in bins) == count
    assert [each.predicted for each in bins] == sorted(each.predicted for each in bins)


def test_training_traces_and_traces_without_a_window_are_refused(stores, planted, indexer, tmp_path):
    with pytest.raises(InputError, match="training documents"):
        evaluate({"indexer": indexer}, stores[0], GOLDEN, 0.1)
    folder = tmp_path / "store"
    shutil.copytree(planted[1].root, folder)
    manifest = read_sealed(folder / "manifest.json")
    manifest["trace"]["chunking"]["recent"] = 40  # every chunk is protected
    write_sealed(folder / "manifest.json", manifest)
    spec = planted_indexer()
    with pytest.raises(InputError, match="no document with a whole lookahead window"):
        evaluate({"indexer": spec}, TraceStore.open(folder), GOLDEN, 0.1)


def test_only_long_documents_make_it_give_memory_back(stores, indexer, monkeypatch):
    returned = []
    monkeypatch.setattr("eval.offline.evaluation.return_freed_memory", lambda: returned.append(True))
    Evaluation({"indexer": indexer}, stores[1], GOLDEN, 0.1, every_token=False)
    assert not returned
    monkeypatch.setattr("eval.offline.evaluation.LONG", 0)
    Evaluation({"indexer": indexer}, stores[1], GOLDEN, 0.1, every_token=False)
    assert returned


def test_rows_by_depth_are_those_of_the_documents_there(stores, compared):
    needles = [document.meta for document in stores[1] if document.meta.depth is not None]
    rows = [row for row in compared["by_depth"] if (row.policy, row.budget) == ("A", "threshold")]
    assert {row.task: row.documents for row in rows} == Counter(depth_bin(each) for each in needles)
    for row in rows:
        there = [each.name for each in needles if depth_bin(each) == row.task]
        kept = [each.kept for each in compared["documents"] if each.name in there]
        assert row.kept == pytest.approx(sum(kept) / len(kept))


def test_pieces_change_neither_reliability_nor_timeline(stores, indexer, monkeypatch):
    def judged():
        return [sample_candidates(indexer, document, GOLDEN) for document in stores[1]]

    whole, shown = judged(), timeline(indexer, stores[1], GOLDEN, 0.1)
    monkeypatch.setattr("eval.offline.recall.PIECE_ELEMENTS", 1)
    assert timeline(indexer, stores[1], GOLDEN, 0.1) == shown
    for (scores, golden), (expected, truth) in zip(judged(), whole, strict=True):
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
        assert torch.equal(golden, truth)
    monkeypatch.setattr("eval.offline.evaluation.SAMPLED", 50)
    assert all(40 < len(scores) <= 51 for scores, _ in judged())


def test_the_timeline_has_one_document_open_at_a_time(stores, indexer, monkeypatch):
    opened, most, document = [], 0, TraceStore.document

    def counted(store, path):
        nonlocal most
        found = document(store, path)
        opened.append(weakref.ref(found))
        most = max(most, sum(each() is not None for each in opened))
        return found

    monkeypatch.setattr(TraceStore, "document", counted)
    assert timeline(indexer, stores[1], GOLDEN, 0.1) is not None
    assert len(opened) > 4 and most == 1


def test_traces_that_do_not_say_how_they_were_split_are_noted(planted):
    indexer = planted_indexer()
    assert unseen_notes({"indexer": indexer}, planted[1]) == []
    indexer.spec.provenance = Provenance(
        backbone="", oracle="attention", sources=[Source(documents={}, training=1)], validation=0, train={}
    )
    (note,) = unseen_notes({"indexer": indexer}, planted[1])
    assert "says nothing of how its documents were split" in note
    planted[1].manifest.documents["split"] = "heldout"
    assert unseen_notes({"indexer": indexer}, planted[1]) == []
    del planted[1].manifest.documents["split"]


def test_a_threshold_for_something_else_is_named(indexer):
    def ask(*selections):
        indexer.spec.selections = list(selections)
        try:
            return threshold_for("A", indexer, 0.1)
        finally:
            indexer.spec.selections = []

    meant = Threshold(target="budget", value=0.1, cuts=[Cut(score=1.0)])
    other = Threshold(target="recall", value=0.9, cuts=[Cut(score=2.0)])
    assert ask(other, meant) == (meant, None)
    used, note = ask(Budget(budget=0.1), other)
    assert used == other and "A has no threshold calibrated to keep 10.0%" in note and "mass recall of 90.0%" in note
    used, note = ask()
    assert used.cuts == [Cut(score=0.0)] and "sigmoid of 0.5" in note


def covering(indexer, *coverages):
    """The indexer with coverages beside its own selections."""
    twin = copy.deepcopy(indexer)
    twin.spec.selections = [*twin.spec.selections, *coverages]
    return twin


def test_a_coverage_has_rows_where_a_threshold_has_them(stores, indexer, other):
    """Of two that are called for, the one for this budget; compared where both indexers have one."""
    ours = covering(indexer, Coverage(share=0.9), Coverage(target="budget", value=0.1, share=0.5))
    found = evaluate({"A": ours, "B": other}, stores[1], GOLDEN, 0.1)
    assert found["evaluated"].coverages == {"A": "the best chunks up to a predicted share of 0.5 (to keep 10.0%)"}
    for section in ("recall", "by_length", "by_depth"):
        rows = {(row.policy, row.task): row for row in found[section] if row.budget == "coverage"}
        assert rows.keys() == {key for key in rows if key[0] == "A" or key[0].startswith("A ") or "layer" in key[0]}
        thresholds = {row.task for row in found[section] if (row.policy, row.budget) == ("A", "threshold")}
        assert {task for policy, task in rows if policy == "A"} == thresholds
    assert {row.budget for row in found["comparison"] if isinstance(row.budget, str)} >= {"threshold"}
    assert not [row for row in found["comparison"] if row.budget == "coverage"]
    both = evaluate({"A": ours, "B": covering(other, Coverage(share=0.9))}, stores[1], GOLDEN, 0.1)
    assert [row for row in both["comparison"] if row.budget == "coverage" and row.metric == "kept"]
    assert (
        Evaluation({"A": ours}, stores[1], GOLDEN, 0.1, False).key
        != Evaluation({"A": covering(indexer, Coverage(share=0.9))}, stores[1], GOLDEN, 0.1, False).key
    )


class OnGpu:
    """An indexer whose tensors are a second device's."""

    device = GPU

    def __init__(self, indexer):
        self.indexer, self.spec = indexer, indexer.spec

    def pack(self, hidden, positions):
        return bring(self.indexer.pack(hidden, positions))

    def layer_logits(self, queries, keys):
        assert there(queries) and there(keys)
        return bring(self.indexer.layer_logits(queries.cpu(), keys.cpu()))


def test_labels_rankings_and_sums_are_made_where_the_indexer_is(stores, indexer):
    here = figures(evaluate({"indexer": indexer}, stores[1], GOLDEN, 0.1))
    with SecondDevice():
        found = figures(evaluate({"indexer": OnGpu(indexer)}, stores[1], GOLDEN, 0.1))
    assert len(here) > 100 and here == pytest.approx(found, abs=1e-5, nan_ok=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_cpu_does(stores, indexer):
    here = figures(evaluate({"indexer": indexer}, stores[1], GOLDEN, 0.1))
    there = figures(evaluate({"indexer": copy.deepcopy(indexer).to("cuda")}, stores[1], GOLDEN, 0.1))
    assert len(here) > 100 and here == pytest.approx(there, abs=1e-5, nan_ok=True)
