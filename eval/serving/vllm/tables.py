"""Shorter block tables: the blocks of the chunks to be read, in order, and the length that goes with them."""

import torch


class Tables:
    """Tables and lengths of one batch, at addresses that never change, as captured CUDA graphs need.

    table: [rows, width] int32; lengths: [rows] int32, in tokens.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    def fill(
        self,
        table: torch.Tensor,
        lengths: torch.Tensor,
        bounds: torch.Tensor,
        visible: list[torch.Tensor | None],
        moved: list[tuple[int, int, int]],
        tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copy the engine's table [B, width] and lengths [B], and shorten rows that read only `visible` chunks.

        bounds: [B], the lengths on the CPU; visible: a row's chunks, [n] int64 on the CPU, the unfinished one last, or
        None; moved: (row, place in its shorter table, block) of blocks that the engine's table does not know; tokens:
        of a block. Positions are in the keys already, so leaving blocks out moves no token. Copies to the device a
        fixed number of times, however many rows there are. Returns views of the copies [B, width] and [B], and new
        bounds.
        """
        rows, device = len(table), self.table.device
        self.table[:rows].copy_(table)
        self.lengths[:rows].copy_(lengths)
        short = {row: chunks for row, chunks in enumerate(visible) if chunks is not None}
        if not short:
            return self.table[:rows], self.lengths[:rows], bounds
        bounds = bounds.clone()
        columns = torch.arange(max(map(len, short.values()))).repeat(rows, 1)
        for row, chunks in short.items():
            columns[row, : len(chunks)] = chunks
            bounds[row] = (len(chunks) - 1) * tokens + (int(bounds[row]) - 1) % tokens + 1
        self.table[:rows, : columns.shape[1]] = table.gather(1, columns.to(device))
        changed = torch.tensor(list(short))
        self.lengths[changed.to(device)] = bounds[changed].to(device, torch.int32)
        if moved:
            row, place, block = torch.tensor(moved, device=device).T
            self.table[row, place] = block.int()
        return self.table[:rows], self.lengths[:rows], bounds
