"""Chunk keys by physical block of the engine's cache, so that blocks which requests share need no second key."""

import torch

WAITING = 1024
"""Tokens whose keys wait, at most: a dozen small operations for each step would cost more than the step's attention."""


class BlockKeys:
    """Sums of the keys of each block's tokens, before RoPE.

    sums: [blocks + 1, L, width] fp32 of the indexer's L layers, the last one for tokens without a block, so that a GPU
    is never waited for; tokens: tokens of a block, which is one chunk. They lack the keys that wait until `settle`.
    """

    def __init__(
        self, blocks: int, layers: int, width: int, tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sums = torch.zeros(blocks + 1, layers, width, device=device)
        self.tokens = tokens
        self._slots = torch.zeros(WAITING, dtype=torch.int64, device=device)
        self._keys = torch.zeros(WAITING, layers, width, dtype=dtype, device=device)
        self._waiting = 0

    def add(self, slots: torch.Tensor, keys: list[torch.Tensor]) -> None:
        """Keys of tokens that were written to `slots` ([T] int64, block x tokens + offset; below 0: none); a list of
        [T, width], a layer each. A block's first token empties it, of what waits too: see `settle`."""
        done = 0
        while done < len(slots):
            if self._waiting == WAITING:
                self.settle()
            taken = min(len(slots) - done, WAITING - self._waiting)
            place = slice(self._waiting, self._waiting + taken)
            self._slots[place] = slots[done : done + taken]
            torch.stack([rows[done : done + taken] for rows in keys], dim=1, out=self._keys[place])
            self._waiting, done = self._waiting + taken, done + taken

    def settle(self) -> None:
        """Add what waits: before `sums` are read, and before a block that was freed can be given to somebody else."""
        if self._waiting:
            slots, keys = self._slots[: self._waiting], self._keys[: self._waiting]
            nowhere = len(self.sums) - 1
            blocks = torch.where(slots >= 0, slots // self.tokens, nowhere)
            begun = torch.where(slots % self.tokens == 0, blocks, nowhere)
            self.sums.index_fill_(0, begun, 0.0)
            self.sums.index_add_(0, blocks, keys.float())
            self._waiting = 0

    def means(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of complete blocks, all settled, [n] -> [n, L, width] fp16, as traces hold them."""
        return (self.sums[blocks.long()] / self.tokens).half()
