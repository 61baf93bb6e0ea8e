"""Shorter block tables: the blocks of the chunks to be read, in order, and the length that goes with them."""

import torch

from data_gen.core.tensors import send
from eval.serving.vllm.sequences import Chosen


class Tables:
    """Tables and lengths of one batch, at addresses that never change, as captured CUDA graphs need.

    table: [rows, width] int32; lengths: [rows] int32, in tokens. Which chunk stands at which place lies on the device
    as well and is sent there only when a row's set changes, so the steps between wait for nothing. Where every row
    reads the set that it read and has as many blocks as before, only the lengths are written.
    """

    def __init__(self, rows: int, width: int, tokens: int, device: torch.device) -> None:
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tokens, self._places = tokens, torch.arange(width)
        self._read: list[Chosen | None] = [None] * rows
        self._made: list[int] = []  # blocks of each row in the newest table
        self._chunks = self._places.repeat(rows, 1).to(device)
        self._blocks = torch.full_like(self.table, -1)
        self._left_out = torch.zeros_like(self.lengths)
        self._left_out_cpu = torch.zeros(rows, dtype=torch.int32)

    def fill(
        self, table: torch.Tensor, lengths: torch.Tensor, bounds: torch.Tensor, read: list[Chosen | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copy the engine's table [B, width] and lengths [B], and shorten rows that `read` a set; None: everything.

        bounds: [B], the lengths on the CPU. Positions are in the keys already, so leaving blocks out moves no token.
        Returns views of the copies [B, width] and [B], and new bounds.
        """
        rows, made = len(table), [-(-length // self._tokens) for length in bounds.tolist()]
        if changed := [row for row in range(rows) if self._read[row] is not read[row]]:
            self._send(changed, [read[row] for row in changed])
        if changed or made != self._made or None in read:  # a set belongs to one request, None says not whose row it is
            blocks = self._blocks[:rows]
            torch.where(blocks < 0, table.gather(1, self._chunks[:rows]), blocks, out=self.table[:rows])
        self._made = made
        torch.sub(lengths, self._left_out[:rows], out=self.lengths[:rows])
        return self.table[:rows], self.lengths[:rows], bounds - self._left_out_cpu[:rows]

    def _send(self, rows: list[int], read: list[Chosen | None]) -> None:
        """Note what these rows read from now on, on the device too."""
        width = len(self._places)
        chunks = self._places.repeat(len(rows), 1)
        blocks = torch.full(chunks.shape, -1, dtype=torch.int32)
        for place, (row, chosen) in enumerate(zip(rows, read, strict=True)):
            self._read[row] = chosen
            left_out, kept = (0, 0) if chosen is None else (chosen.left_out, len(chosen.resident))
            self._left_out_cpu[row] = left_out * self._tokens
            if chosen is not None:
                chunks[place] = (self._places + left_out).clamp(max=width - 1)  # behind the set: what was made since
                chunks[place, :kept] = chosen.resident
                if chosen.blocks is not None:
                    blocks[place, :kept] = chosen.blocks
        index, device = torch.tensor(rows), self.table.device
        where = send(index, device)
        self._chunks[where] = send(chunks, device)
        self._blocks[where] = send(blocks, device)
        self._left_out[where] = send(self._left_out_cpu[index], device)
