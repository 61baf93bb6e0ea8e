"""On what results were measured: the head of the report."""

import subprocess
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from data_gen.core.cpu import processor
from eval.report.rows import Results, Setting
from indexer_train.model import MemoryIndexer


def setting_of(indexer: MemoryIndexer, recipe: str | None, documents: str, first_window: int | None = None) -> Setting:
    """What a verb measures now with `indexer`, which knows its backbone; recipe: as it was named, or by path."""
    spec = indexer.spec
    made = spec.provenance
    return Setting(
        model="unknown" if made is None else made.traced_from,
        recipe=None if recipe is None else Path(recipe).name,
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
        chunking=spec.chunking,
        window=spec.window,
        documents=documents,
        loss=None if made is None else made.train.get("loss"),
        hardware=hardware(indexer.device),
        indexer=indexer.digest(),
        first_window=first_window,
    )


def hardware(device: torch.device) -> str:
    """In words: the GPU, or the processor and how many of its threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{count} {'thread' if count == 1 else 'threads'} of {processor()}"


def documents_line(documents: Iterable[tuple[str, int]], source: str | list[str] | None) -> str:
    """In words: how many (task, tokens) there are, how long, of which tasks and from where."""
    listed = list(documents)
    lengths = [tokens for _, tokens in listed]
    low, high = (f"{length:,}" for length in (min(lengths), max(lengths)))
    tasks = ", ".join(f"{count} {task}" for task, count in sorted(Counter(task for task, _ in listed).items()))
    origin = "" if source is None else f", from {source if isinstance(source, str) else ', '.join(source)}"
    return f"{len(listed)} of {low if low == high else f'{low} to {high}'} tokens ({tasks}){origin}"


def examples_line(results: Results) -> str:
    """In words: the benchmark's examples, from its rows."""
    asked = {(row.benchmark, row.task, row.tokens): row.examples for row in results.benchmark or []}
    asked |= {(row.benchmark, row.task, row.tokens): row.texts for row in results.benchmark_text or []}
    tasks: Counter[str] = Counter()
    for (benchmark, task, _), count in asked.items():
        tasks[" ".join(dict.fromkeys((benchmark, task)))] += count
    counted = ", ".join(f"{count} {task}" for task, count in tasks.items())
    if not asked:
        return "none"
    lengths = [tokens for *_, tokens in asked]
    return f"{tasks.total()} of {min(lengths):,.0f} to {max(lengths):,.0f} tokens on average ({counted})"


def commit() -> str | None:
    """The toolkit's commit (-dirty: files were changed), None where its files are in no checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # installed in a folder of somebody else's checkout
        return None
    return git("describe", "--always", "--dirty", "--exclude=*")
