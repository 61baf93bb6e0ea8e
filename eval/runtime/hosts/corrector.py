"""The per-step correction of one sequence: which absent chunks a layer's own query asks for, and their rows.

The resident set of a window is chosen before its tokens are known. At every token each full-attention layer scores all
chunks by its query against their mean keys after RoPE, and attends to the best of those that are not resident, which
come from the cold side for that layer alone. What was asked for at the token before is still there.
"""

import copy
from collections.abc import Callable, Sequence

import torch

from data_gen.core.errors import InputError
from eval.runtime.correction import Correction

Rows = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of n chunks of one layer, [n, KV, tokens, d] each."""

Fetch = Callable[[int, list[int]], Rows]
"""(layer, ids) -> their rows from the cold side."""

TILE = 64
"""Chunks whose mean keys are made at once."""


def correction_scores(queries: torch.Tensor, means: torch.Tensor, scaling: float) -> torch.Tensor:
    """What queries ask for: [H, S, d] after RoPE, mean keys of chunks after RoPE [KV, N, d] -> [S, N] fp32.

    The softmax over all N chunks, resident or not, then the highest of the heads; attention is grouped. Soft caps and
    sinks of the attention are left aside.
    """
    grouped = queries.float().unflatten(0, (len(means), -1))
    logits = torch.einsum("kgsd,knd->kgsn", grouped, means.float()) * scaling
    return logits.softmax(dim=-1).amax(dim=(0, 1))


class Corrector:
    """What the correction of a sequence holds on the device.

    means: layer -> mean keys after RoPE [KV, N, d] fp16 of the chunks complete at the last refresh; absent: [N] bool,
    which of them are not resident; held: layer -> (ids of the newest token's chunks, their rows); queries: layer -> the
    newest query [H, 1, d]; fetched: chunks fetched so far, counted once a layer.
    """

    def __init__(self, correction: Correction, queries: dict[int, torch.Tensor]) -> None:
        self.correction, self.queries = correction, dict(queries)
        self.means: dict[int, torch.Tensor] = {}
        self.absent = torch.empty(0, dtype=torch.bool)
        self.held: dict[int, tuple[list[int], Rows]] = {}
        self.fetched = 0

    @property
    def active(self) -> bool:
        """Whether anything is absent."""
        return bool(self.absent.any())

    def refresh(self, resident: torch.Tensor, total: int, layers: Sequence[int], fetch: Fetch) -> None:
        """Another set is in force: means of chunks made since, and what is resident now is held no more.

        resident: ids [R] on the CPU, of `total` chunks, all on the cold side; layers: all that are corrected.
        """
        self.absent = torch.ones(total, dtype=torch.bool)
        self.absent[resident] = False
        known = next((means.shape[1] for means in self.means.values()), 0)
        for first in range(known, total, TILE):
            for layer in layers:
                new = (
                    fetch(layer, list(range(first, min(first + TILE, total))))[0]
                    .float()
                    .mean(dim=2)
                    .transpose(0, 1)
                    .half()
                )
                self.means[layer] = torch.cat([self.means[layer], new], dim=1) if layer in self.means else new
        for layer, (chunks, rows) in self.held.items():
            still = [place for place, chunk in enumerate(chunks) if self.absent[chunk]]
            self.held[layer] = [chunks[place] for place in still], (rows[0][still], rows[1][still])

    def rows(self, layer: int, query: torch.Tensor, scaling: float, fetch: Fetch) -> Rows | None:
        """What the layer attends to beside the resident rows, None for nothing; it is held until the next token.

        query: [H, S, d] after RoPE, of new tokens. Raises InputError for several of them while chunks are absent:
        each has chunks of its own, and hosts read them one by one.
        """
        newest = query[:, -1:]
        asks = self.queries.get(layer, newest) if self.correction.query == "previous" else newest
        self.queries[layer] = newest.clone()
        if not self.active:
            return None
        if query.shape[1] > 1:
            raise InputError(
                f"{query.shape[1]} tokens at once, but the per-step correction reads one at a time: something else, "
                "perhaps a logits processor, called the model with this cache; give it a cache of its own"
            )
        scores = correction_scores(asks, self.means[layer], scaling)[0]
        absent = self.absent.to(scores.device)
        count = min(self.correction.chunks, int(self.absent.sum()))
        chunks = scores.masked_fill(~absent, -1).topk(count).indices.sort().values.tolist()
        held, rows = self.held.get(layer, ([], None))
        missing = [chunk for chunk in chunks if chunk not in held]
        parts = [] if rows is None else [rows]
        parts += [fetch(layer, missing)] if missing else []
        place = {chunk: row for row, chunk in enumerate([*held, *missing])}
        order = [place[chunk] for chunk in chunks]
        keys, values = (torch.cat(side)[order] for side in zip(*parts, strict=True))
        self.held[layer] = chunks, (keys, values)
        self.fetched += len(missing)
        return keys, values

    @property
    def chunks_held(self) -> int:
        """Of each layer, beside the resident ones."""
        return next((len(chunks) for chunks, _ in self.held.values()), 0)

    def held_bytes(self) -> int:
        """Of the rows of all layers."""
        return sum(rows.nbytes for _, pair in self.held.values() for rows in pair)

    def mean_bytes(self) -> int:
        """Of the mean keys of all layers."""
        return sum(means.nbytes for means in self.means.values())

    def fork(self) -> "Corrector":
        """An independent continuation; tensors are shared, none is written again."""
        twin = copy.copy(self)
        twin.means, twin.held, twin.queries = dict(self.means), dict(self.held), dict(self.queries)
        return twin
