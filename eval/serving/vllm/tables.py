"""Shorter block tables: the blocks of the chunks to be read, in order, and the length that goes with them."""

import torch


class Tables:
    """Tables and lengths of one batch, at addresses that never change. table: [rows, width] int32; lengths: [rows]."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    def fill(
        self,
        table: torch.Tensor,
        lengths: torch.Tensor,
        bounds: torch.Tensor,
        visible: list[torch.Tensor | None],
        tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copy the engine's table [B, width] and lengths [B], and shorten rows that read only `visible` blocks.

        bounds: [B], the lengths on the CPU; visible: a row's blocks, the unfinished one last, or None.
        Positions are in the keys already, so leaving blocks out moves no token. Returns views of the copies and new
        bounds.
        """
        rows = len(table)
        self.table[:rows].copy_(table)
        self.lengths[:rows].copy_(lengths)
        bounds = bounds.clone()
        for row, blocks in enumerate(visible):
            if blocks is None:
                continue
            self.table[row, : len(blocks)] = blocks
            last = (int(bounds[row]) - 1) % tokens + 1
            self.lengths[row] = bounds[row] = (len(blocks) - 1) * tokens + last
        return self.table[:rows], self.lengths[:rows], bounds
