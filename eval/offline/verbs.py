"""What `lookahead calibrate`, `verify` and `select-layers` do on held-out traces: open, measure, say what was found."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data_gen.traces.store import TraceStore
from eval.offline.verify import verdict_table, verify_indexer, verify_native
from eval.report.tables import table
from indexer_train.formats.bundle import HEADER, load_bundle
from indexer_train.load import load_indexer, open_traces
from indexer_train.measure.calibration import Target
from indexer_train.measure.layer_choice import choose_layers, served_as
from indexer_train.measure.reliability import calibrate_folder

Say = Callable[[str], None]


def calibrate_saved(
    folder: Path,
    traces: Path,
    golden: float,
    target: tuple[Target, float],
    longest: Sequence[int],
    by_budget: bool,
    say: Say,
) -> None:
    """Store how the indexer in `folder` selects when served; arguments as of `calibrate_folder`."""
    indexer = load_indexer(folder)
    found = calibrate_folder(folder, indexer, open_traces(traces, [indexer]), golden, target, longest, by_budget)
    means = {"mass_recall", "golden_recall", "kept"}  # the rest of a row says what was averaged
    header = [f"{name} (task mean)" if name in means else name for name in found.rows[0]]
    say(table(header, [list(row.values()) for row in found.rows]))
    if found.beyond is not None:
        say(f"no held-out context beyond {found.beyond} tokens: the last score serves longer ones unmeasured")
    say(f"served: {indexer.spec.selection}\nexpected calibration error {found.error:.3f}: {found.plot}")


def verify_traces(traces: Path, native: Path | None, indexer: Path | None, say: Say) -> bool:
    """Whether stored native logits, and an indexer's scores, are what float64 says. native: the backbone's checkpoint;
    without it and an indexer the stored queries take its place."""
    store, verdicts = TraceStore.open(traces), []
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


def select_served_layers(folder: Path, traces: Path, count: int, budget: float, out: Path | None, say: Say) -> None:
    """The best choices of `count` layers and of how they are joined; the best one is saved in `out`, if given."""
    indexer = load_indexer(folder)
    best, *others = choose_layers(indexer, open_traces(traces, [indexer]), count, budget)
    rows = [[" ".join(map(str, choice.layers)), choice.join, choice.mass_recall] for choice in (best, *others[:9])]
    say(table(["layers", "join", f"task-mean mass recall at {budget:.1%} kept"], rows))
    if out is not None:
        served_as(indexer, best, budget).save_whole(out)
        say(f"indexer: {out}")
