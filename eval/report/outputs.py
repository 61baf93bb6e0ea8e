"""What a run's answers and text say of an indexer, for its card: full attention and recency beside it."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from data_gen.core.errors import InputError
from data_gen.core.files import RESULTS
from eval.report.rows import AccuracyRow, DecodeRow, FidelityRow, Results
from eval.report.tables import read_results
from indexer_train.spec import OutputRow, Outputs

POLICIES = ("full", "indexer", "recency")
Answered = TypeVar("Answered", AccuracyRow, FidelityRow)


def outputs_of(folder: Path, digest: str) -> list[Outputs]:
    """One for each of decode and benchmark that FOLDER/results.json holds. digest: of the indexer, as it says itself.

    Raises InputError where it holds neither, or measured another indexer.
    """
    results = read_results(folder)
    rows = {"decode": decode_outputs(results.decode or []), "benchmark": benchmark_outputs(results)}
    found = []
    for verb, setting in results.measured.items():
        if not rows.get(verb):
            continue
        if setting.indexer != digest:
            raise InputError(
                f"{folder / RESULTS}: its {verb} did not measure this indexer, or does not say so; export the indexer "
                f"and run `lookahead {verb}` with that bundle"
            )
        found.append(
            Outputs(
                verb=verb,
                documents=setting.documents,
                recipe=setting.recipe,
                commit=setting.commit,
                hardware=setting.hardware or "unknown hardware",
                date=setting.date,
                rows=rows[verb],
            )
        )
    if not found:
        raise InputError(f"{folder / RESULTS}: no answers or text of an indexer there; run `lookahead decode` first")
    return found


def decode_outputs(rows: Iterable[DecodeRow]) -> list[OutputRow]:
    """All held-out documents in one row; none where the indexer was not asked."""
    found = {row.policy: row for row in rows if row.policy in POLICIES}
    if (own := found.get("indexer")) is None:
        return []
    return [
        OutputRow(
            task="held-out documents",
            questions=own.examples,
            texts=own.texts,
            right={name: float(row.correct) for name, row in found.items()} if own.examples else {},
            kl={name: row.kl for name, row in found.items() if row.kl is not None},
            kv_share=own.kv_share,
            kv_mb=own.kv_mb,
        )
    ]


def benchmark_outputs(results: Results) -> list[OutputRow]:
    """A row for each task, length and budget, then for each length and budget of text."""
    found = []
    for task, rows in _places(results.benchmark or []):
        own = rows["indexer"]
        right = {name: row.accuracy * row.examples for name, row in rows.items()}
        found.append(OutputRow(task=task, questions=own.examples, right=right, kv_share=own.kept, kv_mb=own.kv_mb))
    for task, rows in _places(results.benchmark_text or []):
        own, kl = rows["indexer"], {name: row.kl for name, row in rows.items()}
        found.append(OutputRow(task=task, texts=own.texts, kl=kl, kv_share=own.kept, kv_mb=own.kv_mb))
    return found


def _places(rows: Iterable[Answered]) -> Iterator[tuple[str, dict[str, Answered]]]:
    """(what was asked, rows by policy) for each budget of the indexer; full attention, which has none, is in each."""
    for (benchmark, task, _), group in groupby(rows, key=lambda row: (row.benchmark, row.task, row.length)):
        members = list(group)
        full = {row.policy: row for row in members if row.policy == "full"}
        for budget in dict.fromkeys(row.budget for row in members if row.policy == "indexer"):
            beside = {row.policy: row for row in members if row.budget == budget and row.policy in POLICIES}
            asked = " ".join(dict.fromkeys((benchmark, task)))
            yield f"{asked}, {beside['indexer'].tokens:,.0f} tokens, budget {budget:.1%}", full | beside
