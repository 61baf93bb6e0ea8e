"""Level 1 in torch: keys in pages or rows, scored in tiles, and what every backend checks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from data_gen.core.errors import InputError
from data_gen.core.key_bytes import PAGE, SCALE_BYTES, pages_to_rows, rows_to_pages
from data_gen.core.keys import key_vectors
from eval.serving.select import Limits, Resident, resident_chunks
from indexer_train.scoring import join_layers
from indexer_train.selection import Selection
from indexer_train.spec import IndexerSpec

TILE = 8192
"""Chunks decoded and scored at once: the keys of three layers of 128 take 12 MiB in fp32."""


class Indexer(Protocol):
    """A bundle's weights: a `Scorer` (indexer_train/scorer.py), or a MemoryIndexer around one."""

    @property
    def spec(self) -> IndexerSpec:
        """All that it knows besides its weights."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        ...

    def modules(self) -> Iterator[torch.nn.Module]:
        """Its parts, one `Scorer` among them."""
        ...

    def pack(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[B, L, hidden] at positions [B] -> packed queries [B, L * size + 1]."""
        ...

    def layer_logits(self, queries: torch.Tensor, keys: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """Packed queries, keys [N, L * d] of chunks [N] -> [L, B, N]."""
        ...


@dataclass(frozen=True)
class PagedKeys:
    """Chunk keys in a pool of pages (data_gen/core/key_bytes.py), as serving engines hold them.

    pages: [P, L, 64 (d + 4)] uint8, of the indexer's layers in order; any strides over P and L, so that an engine's
    layer-major pool is a transpose. table: [B, T] int32, the pool page of each sequence's 64-chunk block; only entries
    of visible chunks are read. Sequences may share pages.
    """

    pages: torch.Tensor
    table: torch.Tensor

    @classmethod
    def from_rows(cls, rows: torch.Tensor) -> Self:
        """One history as its traces store it, rows [N, L, d + 4] uint8."""
        pages = torch.stack([rows_to_pages(layer) for layer in rows.unbind(dim=1)], dim=1)
        return cls(pages, torch.arange(len(pages), dtype=torch.int32, device=rows.device)[None])

    def rows(self, sequence: int, first: int, last: int) -> torch.Tensor:
        """Chunks first .. last - 1 of a sequence, `first` at a page's start: [last - first, L, d + 4] uint8."""
        pages = self.pages[self.table[sequence, first // PAGE : -(-last // PAGE)].long()]
        layers = pages.shape[1]
        rows = pages_to_rows(pages.flatten(0, 1), len(pages) * layers * PAGE).view(len(pages), layers, PAGE, -1)
        return rows.transpose(1, 2).flatten(0, 1)[: last - first]


class Level1:
    """The torch backend, on the CPU or a GPU: every term of a bundle's score, in tiles.

    limits: floor and cap of the resident set; selection: how chunks are chosen, by default as the bundle says. Raises
    InputError for a cap that cannot hold the protected chunks.
    """

    def __init__(self, indexer: Indexer, limits: Limits, selection: Selection | None = None) -> None:
        limits.check(indexer.spec.chunking)
        self.indexer = indexer
        self.limits = limits
        self.selection = selection or indexer.spec.selection

    @torch.no_grad()
    def pack(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Input of the attention blocks [B, L, hidden] at `positions` [B] -> packed queries [B, L size + 1] fp32."""
        device = self.indexer.device
        return self.indexer.pack(hidden.to(device), positions.to(device)).float()

    @torch.no_grad()
    def joined_scores(self, queries: torch.Tensor, keys: PagedKeys | torch.Tensor) -> torch.Tensor:
        """Joined scores of every visible chunk, -inf after them: [B, N] fp32.

        queries: from `pack`; keys: pages, or rows as a trace stores them, [N, L, d] floats or [N, L, d + 4] uint8:
        one history that all queries share, or [B, N, L, ...] of one each. Beside the result, memory does not grow with
        N. Raises InputError for keys of other layers or widths, damaged ones, or fewer than a position sees.
        """
        seen = [self.indexer.spec.chunking.visible(int(position)) for position in queries[:, -1].tolist()]
        capacity = check_keys(self.indexer.spec, keys, len(seen))
        if max(seen) > capacity:
            raise InputError(f"keys of {capacity} chunks, but a position sees {max(seen)}; pass all complete chunks")
        scores = torch.full((len(seen), capacity), -torch.inf, device=queries.device)
        for row, visible in enumerate(seen):
            for first in range(0, visible, TILE):
                last = min(visible, first + TILE)
                if isinstance(keys, PagedKeys):
                    stored = keys.rows(row, first, last)
                else:
                    stored = (keys if keys.ndim == 3 else keys[row])[first:last]
                chunks = torch.arange(first, last, device=queries.device)
                logits = self.indexer.layer_logits(queries[row : row + 1], key_vectors(stored).flatten(1), chunks)
                scores[row, first:last] = join_layers(logits, self.indexer.spec.shape.join)[0]
        return scores

    def resident(self, queries: torch.Tensor, keys: PagedKeys | torch.Tensor) -> Resident:
        """The chunks that must be resident; queries: [B, L size + 1]; keys: as of `joined_scores`."""
        chunking, positions = self.indexer.spec.chunking, queries[:, -1].long()
        return resident_chunks(self.joined_scores(queries, keys), positions, chunking, self.selection, self.limits)


def check_keys(spec: IndexerSpec, keys: PagedKeys | torch.Tensor, sequences: int) -> int:
    """How many chunks the keys, as of `Level1.joined_scores`, have room for: [N, ...], [B, N, ...] or pages.

    Raises InputError when they are not those that the indexer reads.
    """
    layers, width = len(spec.layers), spec.key_width
    if isinstance(keys, PagedKeys):
        if keys.pages.dtype != torch.uint8 or keys.pages.shape[1:] != (layers, PAGE * (width + SCALE_BYTES)):
            raise InputError(
                f"key pages {keys.pages.dtype} {list(keys.pages.shape)}: the indexer reads uint8 [pages, {layers}, "
                f"{PAGE * (width + SCALE_BYTES)}], pages of {PAGE} keys of its {layers} layers"
            )
        if len(keys.table) != sequences:
            raise InputError(f"page table of {len(keys.table)} sequences for {sequences} queries")
        return keys.table.shape[1] * PAGE
    stored = width + SCALE_BYTES if keys.dtype == torch.uint8 else width
    if keys.ndim not in (3, 4) or keys.shape[-2:] != (layers, stored):
        raise InputError(f"keys {list(keys.shape)}: the indexer reads [chunks, {layers}, {stored}]")
    if keys.ndim == 4 and len(keys) != sequences:
        raise InputError(f"keys of {len(keys)} sequences for {sequences} queries")
    return keys.shape[-3]
