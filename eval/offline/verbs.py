"""What `lookahead evaluate`, `calibrate`, `verify` and `select-layers` do on traces: open, measure, say the outcome."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.core.cluster import Cluster
from data_gen.core.files import RESULTS, alone
from data_gen.core.shard import ALL, Shard
from data_gen.core.tell import Progress, Say
from data_gen.traces.store import TraceStore
from eval.offline.evaluate_on_ray import measure_on_ray
from eval.offline.evaluation import Evaluation
from eval.offline.parts import PARTS
from eval.offline.verify import verdict_table, verify_indexer, verify_native
from eval.report.figures import plot_recall
from eval.report.page import write_report
from eval.report.setting import documents_line, setting_of
from eval.report.tables import (
    Table,
    calibrated_lines,
    comparison_table,
    read_results,
    recall_table,
    write_results,
)
from indexer_train.config import Rule, TrainConfig
from indexer_train.formats.bundle import HEADER, load_bundle
from indexer_train.load import load_indexer, open_traces
from indexer_train.measure.layer_choice import choose_layers, criterion, served_as
from indexer_train.measure.reliability import calibrate_folder
from indexer_train.selection import Target


@dataclass(frozen=True)
class EvaluateOptions:
    """How `lookahead evaluate` works: a window from every token, a store that lacks documents, which worker it is."""

    every_token: bool = False
    partial: bool = False
    shard: Shard = ALL
    cluster: Cluster | None = None


def evaluate_traces(
    train: TrainConfig,
    paths: dict[str, Path],
    traces: Path,
    out: Path,
    recipe: str,
    asked: EvaluateOptions,
    say: Say,
    progress: Progress,
) -> None:
    """Recall of the indexers in `paths`, by name, on held-out traces: adds to `out`/results.json and the report.

    A worker of several adds nothing until every document's part is there; then the last one does. recipe: what the
    report calls it.
    """
    read_results(out)  # what cannot be added to is found before the work
    asked.shard.use_own_gpu()
    indexers = {name: load_indexer(path) for name, path in paths.items()}
    store = open_traces(traces, indexers.values(), asked.partial, None if asked.cluster else asked.shard)
    evaluation = Evaluation(indexers, store, train.golden, train.budget, asked.every_token)
    folder = out / PARTS / evaluation.key
    if asked.cluster is not None:
        told = {"indexers": json.dumps({name: str(path.absolute()) for name, path in paths.items()})}
        told |= {"traces": str(traces.absolute()), "train": train.model_dump_json(), "folder": str(folder.absolute())}
        told |= {"every_token": str(asked.every_token), "partial": str(asked.partial)}
        measure_on_ray(evaluation, folder, told, asked.cluster, progress)
    elif missing := evaluation.measure_shard(folder, asked.shard, progress):
        say(f"{missing} of {len(store)} documents are not measured yet; whichever shard is last writes the results")
        return
    with alone(out):
        if not folder.exists():  # another worker was last, too
            return
        _report(evaluation, paths, evaluation.merged(evaluation.parts(folder)), out, recipe, say)
        shutil.rmtree(folder)  # no sooner: where the disk is full, they are what was measured
        with suppress(OSError):  # parts of another evaluation are there
            (out / PARTS).rmdir()


def _report(
    evaluation: Evaluation, paths: dict[str, Path], found: dict[str, Any], out: Path, recipe: str, say: Say
) -> None:
    store = evaluation.store
    read = [(document.meta.task, document.meta.length) for document in store]
    told = documents_line(read, store.manifest.documents.get("source"))
    setting = setting_of(next(iter(evaluation.indexers.values())), recipe, told)
    results = write_results(out, **found, measured={"evaluate": setting})
    rows = results.recall or []
    plot_recall(rows, out / "recall.png")
    notes = results.evaluated.notes if results.evaluated else []
    say("\n".join([str(recall_table(rows)), *calibrated_lines(results), *notes]))
    if results.comparison:
        named = [f"{name}: {path}" for name, path in paths.items()]
        say("\n".join([*named, str(comparison_table(results.comparison))]))
    page, _ = write_report(out)
    say(f"results: {out / RESULTS}\nplot: {out / 'recall.png'}\nreport: {page}")


def calibrate_saved(
    folder: Path,
    traces: Path,
    golden: float,
    target: tuple[Target, float],
    longest: Sequence[int],
    by: Rule,
    partial: bool,
    say: Say,
) -> None:
    """Store how the indexer in `folder` selects when served; arguments as of `calibrate_folder`."""
    indexer = load_indexer(folder)
    store = open_traces(traces, [indexer], partial)
    found = calibrate_folder(folder, indexer, store, golden, target, longest, by)
    means = {"mass_recall", "golden_recall", "kept"}  # the rest of a row says what was averaged
    header = [f"{name} (task mean)" if name in means else name for name in found.rows[0]]
    say(str(Table(header, [list(row.values()) for row in found.rows])))
    if found.beyond is not None:
        say(f"no held-out context beyond {found.beyond} tokens: the last score serves longer ones unmeasured")
    error = "" if found.error is None else f"expected calibration error: {found.error:.3f}\n"
    say(f"served: {indexer.spec.selection}\n{error}plot: {found.plot}")


def verify_traces(traces: Path, native: Path | None, indexer: Path | None, partial: bool, say: Say) -> bool:
    """Whether stored native logits, and an indexer's scores, are what float64 says. native: the backbone's checkpoint;
    without it and an indexer the stored queries take its place."""
    store, verdicts = TraceStore.open(traces, partial), []
    if native is not None or indexer is None:
        verdicts.append(verify_native(store, native))
    if indexer is not None:
        loaded = load_bundle(indexer) if (indexer / HEADER).exists() else load_indexer(indexer)
        verdicts.append(verify_indexer(loaded, store))
    say(verdict_table([row for verdict in verdicts for row in verdict.rows]))
    for line in (note for verdict in verdicts for note in verdict.notes):
        say(line)
    failures = [line for verdict in verdicts for line in verdict.failures]
    for line in failures:
        say(f"FAIL {line}")
    if not failures:
        say("verified")
    return not failures


def select_served_layers(
    folder: Path, traces: Path, count: int, budget: float, out: Path | None, partial: bool, say: Say
) -> None:
    """The best choices of `count` layers and of how they are joined; the best one is saved in `out`, if given.

    They are ranked on traces. What they do to answers is for `lookahead benchmark` to say.
    """
    indexer = load_indexer(folder)
    best, *others = choose_layers(indexer, open_traces(traces, [indexer], partial), count, budget)
    rows = [
        [" ".join(map(str, choice.layers)), choice.join, choice.peak_entropy, choice.mass_recall]
        for choice in (best, *others[:9])
    ]
    header = ["layers", "join", "peak entropy, nats (task mean)", f"mass recall at {budget:.1%} kept (task mean)"]
    say(f"{Table(header, rows)}\nranked by {criterion(indexer).replace('_', ' ')} on traces, as in training")
    if out is not None:
        served_as(indexer, best, budget).save_whole(out)
        say(f"indexer: {out}")
