"""Recall against a slow, literal reading of the definitions."""

import pytest
import torch

from data_gen.config import TraceConfig
from data_gen.core.chunks import Chunking
from data_gen.core.key_bytes import encode_keys
from data_gen.flashmemory.document import V4_FLASH
from data_gen.traces.labels import GoldenChunks
from data_gen.traces.store import TraceStore
from data_gen.traces.types import DocumentMeta, Manifest, RawTrace, Span
from eval.offline.policies import POLICIES, Frequency, Random, mean_pooled, oracle, policies, recency, used_now
from eval.offline.recall import BUDGETS, Group, measure, recall_rows
from eval.report.figures import plot_recall
from eval.report.rows import RecallRow
from eval.report.tables import STYLES, recall_table
from indexer_train.measure.metrics import DocumentScorer, served_windows
from indexer_train.selection import Coverage, Cut, Threshold
from tests.data_gen.traces.spread import spread
from tests.eval.conftest import planted_indexer
from tests.eval.offline.recalled import evaluate_recall

SHOWN = {"indexer", *POLICIES} - {"native_votes"}
"""What traces of attention allow."""


@pytest.fixture(scope="module")
def rows(stores, indexer):
    return evaluate_recall(indexer, stores[1], 0.05, threshold=0.0)


def literal(served, scores, window, budget):
    """(mass recall, golden recall or None, precision) of one window, chunk by chunk."""
    position = int(served.positions[window])
    first, last = served.chunking.candidates(position)
    count = max(1, int(budget * ((position + 1) // served.chunking.tokens)))
    chosen = sorted(range(first, last), key=lambda c: (-float(scores[window, c]), c))[:count]
    mass, peak = served.labels.mass[window], served.labels.peak[window]
    golden = [c for c in range(first, last) if peak[c] >= 0.05]
    hits = len(set(chosen) & set(golden))
    recall = hits / len(golden) if golden else None
    return float(mass[chosen].sum() / (mass.sum() + served.labels.rest[window])), recall, hits / len(chosen)


def test_rows_are_means_over_documents_of_means_over_windows(stores, rows):
    found = {(r.policy, r.task, r.budget): r for r in rows}
    for name in ("oracle", "mean_pooled", "recency", "random", "exact_attention", "frequency"):
        for budget in BUDGETS:
            cells = {"text": [], "multi_value": []}
            for document in stores[1]:
                for served in served_windows([document]):
                    scores = policies(document, 0.05)[name](served)
                    windows = [literal(served, scores, w, budget) for w in range(len(served.windows))]
                    cells[document.meta.task].append(windows)
            for task, documents in cells.items():
                row = found[name, task, budget]
                assert row.documents == 2 and row.windows == sum(map(len, documents))
                masses = [sum(w[0] for w in windows) / len(windows) for windows in documents]
                assert abs(row.mass_recall - sum(masses) / 2) < 1e-5
                assert min(masses) - 1e-5 <= row.interval.mass_recall[0] <= row.mass_recall + 1e-9
                if name != "oracle":  # its golden recall has another choice
                    precision = [sum(w[2] for w in windows) / len(windows) for windows in documents]
                    assert abs(row.precision - sum(precision) / 2) < 1e-6
                    recalls = [[w[1] for w in windows if w[1] is not None] for windows in documents]
                    means = [sum(values) / len(values) for values in recalls if values]
                    assert abs(row.golden_recall - sum(means) / len(means)) < 1e-6


def test_micro_averages_add_all_windows_up(stores, rows):
    row = next(r for r in rows if (r.policy, r.task, r.budget) == ("recency", "text", 0.1))
    served = [s for s in served_windows(stores[1]) if s.document.meta.task == "text"]
    chosen = [s.kept(0.1).sum() for s in served]
    assert row.micro.kept == pytest.approx(float(sum(chosen) / sum(s.visible.sum() for s in served)))
    needed = sum(float(s.labels.mass.sum() + s.labels.rest.sum()) for s in served)
    got = 0.0
    for s in served:
        for window, count in enumerate(s.kept(0.1).tolist()):
            last = s.chunking.candidates(int(s.positions[window]))[1]
            got += float(s.labels.mass[window, max(s.chunking.sink, last - count) : last].sum())
    assert row.micro.mass_recall == pytest.approx(got / needed, rel=1e-5)


def test_the_oracle_bounds_every_policy_and_protected_chunks_are_nobodys_credit(rows):
    best = {(r.task, r.budget): r for r in rows if r.policy == "oracle"}
    for row in rows:
        if isinstance(row.budget, float):
            bound = best[row.task, row.budget]
            assert row.mass_recall <= bound.mass_recall + 1e-6
            assert row.golden_recall is None or row.golden_recall <= bound.golden_recall + 1e-6
        if row.policy == "protected":
            assert row.mass_recall == row.kept == 0 < row.resident_mass
    assert {r.policy for r in rows} == SHOWN | {"layer 0", "layer 2"}


def test_every_token_starts_a_window_when_asked(stores, indexer):
    served = evaluate_recall(indexer, stores[1], 0.05, 0.0)
    every = evaluate_recall(indexer, stores[1], 0.05, 0.0, every_token=True)
    count = sum(len(document.windows(serving=False)) for document in stores[1] if document.meta.task == "text")
    assert next(r.windows for r in every if r.task == "text") == count
    assert every[0].windows > served[0].windows


def test_pieces_change_nothing(stores, indexer, rows, monkeypatch):
    monkeypatch.setattr("eval.offline.recall.PIECE_ELEMENTS", 1)  # one window at a time
    for row, whole in zip(evaluate_recall(indexer, stores[1], 0.05, 0.0), rows, strict=True):
        assert (row.policy, row.budget) == (whole.policy, whole.budget)
        assert row.mass_recall == pytest.approx(whole.mass_recall, abs=1e-6)
        assert row.f1 == pytest.approx(whole.f1, abs=1e-6)


def test_a_trained_secret_beats_what_needs_no_training(planted):
    measured = list(
        measure({"indexer": planted_indexer()}, planted[1], 0.5, {"indexer": [Threshold(cuts=[Cut(score=0.0)])]})
    )
    found = recall_rows(measured, RecallRow, lambda _: [Group("all")])
    recall = {row.policy: row.golden_recall for row in found if row.budget == 0.1}
    assert recall["oracle"] == recall["indexer"] == 1.0
    assert recall["exact_attention"] < 0.75 and recall["random"] < 0.3  # half of a window is its first token


def test_baselines_see_the_past_only(stores):
    for document in stores[1]:
        for served in served_windows([document]):
            seen = spread(document.oracle)
            for policy in (used_now, Frequency(document, 0.05)):
                scores = policy(served)
                for window, row in enumerate(served.windows[:, 0].tolist()):
                    candidate = served.labels.candidate[window]
                    now = seen[0][row] if policy is used_now else (seen[1][: row + 1] >= 0.05).sum(dim=0).float()
                    order = scores[window][candidate].argsort()
                    assert (now[candidate][order].diff() >= 0).all()  # the ranks are those of what was seen
                    ties = now[candidate][order].diff() == 0
                    assert (order.diff()[ties] > 0).all()  # the newer of equals ahead


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    """A store of one document in which native indexers voted: the last 4 of 803 tokens, 200 chunks."""
    trace = TraceConfig(chunking=Chunking(tokens=4), layers=[10], oracle="indexer", window=4, text_rows=4, tail=4)
    manifest = Manifest(backbone=V4_FLASH, trace=trace, documents={}, plan={0: ("doc_00000", "")}, versions={})
    store = TraceStore.create(tmp_path_factory.mktemp("voted") / "traces", manifest)
    generator = torch.Generator().manual_seed(5)
    raw = RawTrace(
        hidden={10: torch.zeros(4, 4096).bfloat16()},
        keys={10: encode_keys(torch.randn(200, 128, generator=generator))},
        positions=torch.arange(799, 803),
        oracle=GoldenChunks.from_votes(torch.randint(0, 6, (4, 200), generator=generator), 3),
    )
    span = Span(first=0, last=4, serve=0, tail=False)
    store.write(0, DocumentMeta(name="doc_00000", task="chat", length=803, spans=[span]), raw)
    return store


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_scores_every_chunk_the_same_on_every_run(stores, voted, name):
    allowing = 0
    for document in [*stores[1], *voted]:
        if name not in policies(document, 0.05):
            continue
        for served in served_windows([document]):
            scores, again = (policies(document, 0.05)[name](served) for _ in range(2))
            assert scores.shape == (len(served.windows), document.chunks) and torch.equal(scores, again)
            allowing += 1
    assert allowing and name in STYLES


def test_random_goes_on_from_window_to_window(stores):
    document = next(iter(stores[1]))
    served = next(served_windows([document]))
    one, two = Random(document)(served), Random(document)(served)
    assert torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert (recency(served).diff(dim=1) > 0).all()
    assert mean_pooled(served).shape == oracle(served).shape == one.shape


def test_tables_and_plot_show_every_policy(rows, tmp_path):
    text = str(recall_table(rows))
    assert all(policy in text for policy in SHOWN)
    plot_recall(rows, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_a_long_document_are_sorted_and_the_same_to_the_last_bit(stores, monkeypatch):
    for document in stores[1]:
        for windows in (document.windows(serving=True), document.windows(serving=False)):
            whole = document.labels(windows)
            monkeypatch.setattr("data_gen.traces.labels.DENSE_ELEMENTS", 0)
            monkeypatch.setattr("data_gen.traces.labels.SPREAD_WINDOWS", 5)
            few = document.labels(windows)
            monkeypatch.undo()
            for name in ("mass", "peak", "candidate", "rest"):
                assert torch.equal(getattr(few, name), getattr(whole, name))


def test_recall_at_k_against_a_literal_count(stores, rows):
    row = next(r for r in rows if (r.policy, r.task, r.budget) == ("mean_pooled", "text", "top 8"))
    means = []
    for document in (document for document in stores[1] if document.meta.task == "text"):
        found = []
        for served in served_windows([document]):
            scores = mean_pooled(served)
            for window, position in enumerate(served.positions.tolist()):
                first, last = served.chunking.candidates(position)
                best = sorted(range(first, last), key=lambda c: (-float(scores[window, c]), c))[:8]
                golden = [c for c in range(first, last) if served.labels.peak[window, c] >= 0.05]
                found += [sum(c in best for c in golden) / len(golden)] if golden else []
        means.append(sum(found) / len(found))
    assert row.golden_recall == pytest.approx(sum(means) / len(means), abs=1e-6)


def test_every_cut_is_of_the_same_documents(rows):
    tops = {row.budget for row in rows if str(row.budget).startswith("top")}
    assert "top 8" in tops
    for task in {row.task for row in rows}:
        assert len({row.documents for row in rows if row.task == task and row.policy == "indexer"}) == 1


def test_each_layer_is_counted_at_the_threshold(stores, indexer, rows):
    row = next(r for r in rows if (r.policy, r.task, r.budget) == ("layer 2", "text", "threshold"))
    kept = []
    for served in served_windows(document for document in stores[1] if document.meta.task == "text"):
        chosen = served.labels.candidate & (DocumentScorer(indexer, served.document).layer_logits(served)[1] >= 0)
        kept.append(float((chosen.sum(dim=1) / served.visible).mean()))
    assert row.kept == pytest.approx(sum(kept) / len(kept))


def test_a_coverage_is_counted_beside_the_threshold(stores, indexer):
    given = {"indexer": [Threshold(cuts=[Cut(score=0.0)]), Coverage(share=0.6)]}
    found = list(measure({"indexer": indexer}, stores[1], 0.05, given, budgets=(), baselines=False))
    rows = {(r.policy, r.task, r.budget): r for r in recall_rows(found, RecallRow, lambda meta: [Group(meta.task)])}
    means = []
    for document in stores[1]:
        if document.meta.task == "text":
            kept = []
            for served in served_windows([document]):
                scores = DocumentScorer(indexer, document).joined_scores(served).double()
                for window, candidate in enumerate(served.labels.candidate):
                    covered = scores[window, candidate].sort(descending=True).values.softmax(dim=0).cumsum(dim=0)
                    kept.append((1 + int((covered < 0.6).sum())) / int(served.visible[window]))
            means.append(sum(kept) / len(kept))
    assert rows["indexer", "text", "coverage"].kept == pytest.approx(sum(means) / len(means))
    assert ("indexer", "text", "threshold") in rows and ("layer 2", "text", "coverage") in rows
