"""A resident set over time: recall against refresh interval, decay inside a window, churn; one document's timeline."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from data_gen.traces.labels import lookahead_windows
from data_gen.traces.store import TraceDocument, TraceStore
from data_gen.traces.types import DocumentMeta, Manifest
from eval.offline.policies import Policy, golden_tokens, policies
from eval.offline.recall import in_pieces, measured_on, task_groups
from eval.report.rows import DecayRow, Lookahead, RefreshRow, Timeline, TimelineWindow
from indexer_train.measure.intervals import bootstrap_means
from indexer_train.measure.metrics import DocumentScorer, ServedWindows, needed_mass, selected_mass
from indexer_train.model import MemoryIndexer
from indexer_train.scoring import ranking, select

INTERVALS = (8, 16, 32, 64, 128, 256)
"""Tokens between two refreshes."""
DECAY_STEP = 8
"""Tokens of a window that share one value of its decay."""
SHOWN = 12
"""Windows of a timeline, at most."""
BINS = 256
"""Rows of its picture: chunks of longer documents share one."""


@dataclass
class Sums:
    """What one document adds up to.

    mass, needed: over tokens; fetched, selected: chunks over refreshes; longest: tokens of its longest window.
    """

    mass: float = 0.0
    needed: float = 0.0
    fetched: int = 0
    selected: int = 0
    refreshes: int = 0
    longest: int = 0
    offsets: dict[int, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))


def chunk_bytes(manifest: Manifest) -> int | None:
    """Bytes that a fetch of one chunk moves, over all layers that evict, None where the traces do not say; as
    eval/plan/plan.py."""
    stored, compressed = manifest.backbone.entry_bytes, manifest.backbone.key == "fp8_rope_hadamard"
    return stored if stored is None or compressed else stored * manifest.trace.chunking.tokens


def analyse_lookahead(indexers: dict[str, MemoryIndexer], store: TraceStore, golden: float, budget: float) -> Lookahead:
    """`lookahead_rows` of all documents of a store."""
    found = [(document.meta, lookahead_sums(indexers, document, golden, budget)) for document in store]
    return lookahead_rows(found, store.manifest)


def lookahead_sums(
    indexers: dict[str, MemoryIndexer], document: TraceDocument, golden: float, budget: float
) -> dict[tuple[str, int], Sums]:
    """What one document adds to `lookahead_rows`, by policy and interval."""
    sums: dict[tuple[str, int], Sums] = defaultdict(Sums)
    device = measured_on(indexers)
    scorers = {name: DocumentScorer(indexer, document) for name, indexer in indexers.items()}
    for interval in sorted({*INTERVALS, document.trace.window}):
        scored: dict[str, Policy] = {name: scorer.joined_scores for name, scorer in scorers.items()}
        scored |= policies(document, golden)
        del scored["protected"]  # keeps nothing, fetches nothing
        before: dict[str, torch.Tensor | None] = {}
        for served in in_pieces(document, refresh_windows(document, interval), device):
            for name, score in scored.items():
                chosen = select(score(served), served.labels.candidate, served.kept(budget))
                _measure(sums[name, interval], served, chosen)
                before[name] = _churn(sums[name, interval], served, chosen, before.get(name))
                if interval == document.trace.window:
                    _decay(sums[name, interval], served, chosen)
    return dict(sums)


def lookahead_rows(found: list[tuple[DocumentMeta, dict[tuple[str, int], Sums]]], manifest: Manifest) -> Lookahead:
    """Every indexer (by name) and policy refreshing every 8 to 256 tokens, and every tau, under one budget.

    mass_recall is the share of a document's attention mass that was resident, its tokens added up before dividing
    (token-weighted), then the mean over documents; churn the share of the selected chunks that a refresh has to fetch;
    decay the same recall by distance from the refresh in tokens, at the traces' own window. What arrives after a
    refresh stays resident until the next. Text is cut to a multiple of the longest interval that fits: every interval
    sees the same tokens. Groups without a span as long as an interval have no row of it.
    """
    sums: dict[tuple[str, str, int], list[Sums]] = defaultdict(list)
    for meta, of_document in found:
        for (name, interval), each in of_document.items():
            for group in task_groups(meta):
                sums[name, group, interval].append(each)
    size = chunk_bytes(manifest)
    whole = {key: members for key, members in sums.items() if max(each.longest for each in members) >= key[2]}
    rows = [_row(*key, members, size) for key, members in whole.items()]
    window = manifest.trace.window
    decay = [row for (name, group, every), members in whole.items() if every == window
             for row in _decay_rows(name, group, members)]  # fmt: skip
    return Lookahead(rows=rows, decay=decay)


def refresh_windows(document: TraceDocument, interval: int) -> torch.Tensor:
    """[W, 2] rows of the windows between refreshes `interval` tokens apart, where there is a chunk to choose."""
    spans = []
    for span in document.meta.spans:
        fitting = [each for each in INTERVALS if each <= span.last - span.serve]
        last = span.last if span.tail or not fitting else span.last - (span.last - span.serve) % fitting[-1]
        spans.append(span.model_copy(update={"last": last}))
    return lookahead_windows(spans, document.positions, document.trace.chunking, interval, interval, shortest=1)


def _measure(sums: Sums, served: ServedWindows, chosen: torch.Tensor) -> None:
    tokens = served.windows.diff(dim=1)[:, 0].double().to(served.device)  # labels are means over a window's tokens
    sums.mass += float((selected_mass(chosen, served.labels) * tokens).sum())
    sums.needed += float((needed_mass(served.labels) * tokens).sum())
    sums.longest = max(sums.longest, int(served.windows.diff(dim=1).max()))


def _churn(sums: Sums, served: ServedWindows, chosen: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor | None:
    """Count what each refresh fetches: chosen chunks that were evicted before. Returns the last resident set [N].

    Resident are chosen and protected chunks, and those that did not exist yet: they were made on the GPU.
    """
    index = torch.arange(chosen.shape[1], device=chosen.device)
    ends = [served.chunking.candidates(position)[1] for position in served.positions.tolist()]
    resident = chosen | (index < served.chunking.sink) | (index >= torch.tensor(ends).to(chosen.device)[:, None])
    starts = {span.serve for span in served.document.meta.spans}
    first = served.windows[:, 0].tolist()
    later = [row for row in range(len(first)) if first[row] not in starts and (row or before is not None)]
    earlier = torch.cat([resident[:1] if before is None else before[None], resident[:-1]])
    sums.fetched += int((chosen[later] & ~earlier[later]).sum())
    sums.selected += int(chosen[later].sum())
    sums.refreshes += len(later)
    return resident[-1]


def _decay(sums: Sums, served: ServedWindows, chosen: torch.Tensor) -> None:
    """Add the mass that each part of a window finds in the set chosen at its start."""
    for offset in range(0, served.document.trace.window, DECAY_STEP):
        first = served.windows[:, 0] + offset
        last = torch.minimum(first + DECAY_STEP, served.windows[:, 1])
        rows = (last > first).nonzero()[:, 0]
        if len(rows):
            part = served.document.labels(torch.stack([first, last], dim=1)[rows], served.device)
            # Chunks protected at the refresh stay resident.
            part = replace(part, mass=part.mass * served.labels.candidate[rows])
            tokens = (last - first)[rows].double().to(served.device)
            sums.offsets[offset][0] += float((selected_mass(chosen[rows], part) * tokens).sum())
            sums.offsets[offset][1] += float((needed_mass(part) * tokens).sum())


def _row(policy: str, group: str, interval: int, members: list[Sums], size: int | None) -> RefreshRow:
    churn, _, _ = _interval([each.fetched / each.selected for each in members if each.selected])
    recall, low, high = _interval([each.mass / each.needed for each in members if each.needed])
    refreshes = sum(each.refreshes for each in members)
    fetched = sum(each.fetched for each in members) / refreshes if refreshes else None
    moved = None if fetched is None or size is None else fetched * size
    return RefreshRow(
        policy=policy,
        task=group,
        interval=interval,
        mass_recall=recall,
        low=low,
        high=high,
        churn=churn,
        fetched_chunks=fetched,
        fetched_bytes=moved,
        bytes_per_token=None if moved is None else moved / interval,
        documents=len(members),
        refreshes=refreshes,
    )


def _decay_rows(policy: str, group: str, members: list[Sums]) -> Iterator[DecayRow]:
    for offset in sorted({offset for each in members for offset in each.offsets}):
        parts = [each.offsets[offset] for each in members if offset in each.offsets]
        recall, low, high = _interval([mass / needed for mass, needed in parts if needed])
        yield DecayRow(
            policy=policy,
            task=group,
            offset=offset,
            mass_recall=recall,
            low=low,
            high=high,
            documents=len(parts),
        )


def _interval(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high) over documents, None where there is none."""
    if not values:
        return None, None, None
    mean, low, high = (float(each[0]) for each in bootstrap_means(np.array(values)[:, None]))
    return (mean, None, None) if np.isnan(low) else (mean, low, high)


def timeline(indexer: MemoryIndexer, store: TraceStore, golden: float, budget: float) -> Timeline | None:
    """The document with the most windows (then the most golden chunks), its first SHOWN of them; None without any."""
    counts = {path: len(store.document(path).windows(serving=True)) for path in store.files}  # none stays open
    most = max(counts.values())
    if not most:
        return None

    def needs(path: Path) -> int:
        document = store.document(path)
        pieces = in_pieces(document, document.windows(serving=True), indexer.device)
        return sum(int(served.labels.golden(golden).sum()) for served in pieces)

    document = store.document(max((path for path, count in counts.items() if count == most), key=needs))
    served = ServedWindows.of(document, document.windows(serving=True)[:SHOWN])
    candidate = served.labels.candidate
    scores = DocumentScorer(indexer, served.document).joined_scores(served)
    chosen = select(scores, candidate, served.kept(budget))
    bin_chunks = -(-document.chunks // BINS)
    ranks = _pooled(_percentile(scores, candidate), bin_chunks)
    refreshes, needed = [], []
    for row, (first, last) in enumerate(served.windows.tolist()):
        inside = candidate[row].nonzero()[:, 0]
        refreshes.append(
            TimelineWindow(
                first=int(document.positions[first]),
                last=int(document.positions[last - 1]),
                candidates=(int(inside[0]), int(inside[-1]) + 1),
                kept=chosen[row].nonzero()[:, 0].tolist(),
                ranks=ranks[row].tolist(),
            )
        )
        needed += _needed(document, golden, range(first, last), candidate[row], chosen[row])
    meta = document.meta
    return Timeline(
        document=meta.name,
        task=meta.task,
        length=meta.length,
        chunk_tokens=served.chunking.tokens,
        chunks=document.chunks,
        bin_chunks=bin_chunks,
        budget=budget,
        windows=refreshes,
        needed=needed,
    )


def _needed(
    document: TraceDocument, golden: float, rows: range, candidate: torch.Tensor, chosen: torch.Tensor
) -> list[tuple[int, int, int]]:
    ends, chunks = golden_tokens(document, golden)
    found = []
    for row in rows:
        for chunk in chunks[ends[row] : ends[row + 1]].tolist():
            if candidate[chunk]:
                found.append((int(document.positions[row]), chunk, int(chosen[chunk])))
    return found


def _percentile(scores: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """[W, N] -> 100 for the best candidate of a row, down to nearly 0; 0 where there is no candidate."""
    order = ranking(scores, candidate)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(scores.shape[1]).expand_as(order))
    return (100 * (1 - place / candidate.sum(dim=1, keepdim=True))) * candidate


def _pooled(values: torch.Tensor, size: int) -> torch.Tensor:
    """Maxima over `size` neighbours: [W, N] -> [W, ceil(N / size)] int."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % size))
    return padded.unflatten(1, (-1, size)).amax(dim=2).ceil().int()
