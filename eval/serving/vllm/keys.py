"""Chunk keys by physical block of the engine's cache, so that blocks which requests share need no second key."""

import torch


class BlockKeys:
    """Sums of the keys of each block's tokens, before RoPE.

    sums: [blocks + 1, L, width] fp32 of the indexer's L layers, the last one for tokens without a block, so that a GPU
    is never waited for; tokens: tokens of a block, which is one chunk.
    """

    def __init__(self, blocks: int, layers: int, width: int, tokens: int, device: torch.device) -> None:
        self.sums = torch.zeros(blocks + 1, layers, width, device=device)
        self.tokens = tokens

    def add(self, slots: torch.Tensor, keys: list[torch.Tensor]) -> None:
        """Keys of tokens that were written to `slots` ([T], block x tokens + offset; below 0: none); a list of
        [T, width], a layer each. A block's first token empties it."""
        nowhere = len(self.sums) - 1
        blocks = torch.where(slots >= 0, slots.long() // self.tokens, nowhere)
        begun = torch.where(slots % self.tokens == 0, blocks, nowhere)
        self.sums.index_fill_(0, begun, 0.0)
        for layer, rows in enumerate(keys):
            self.sums[:, layer].index_add_(0, blocks, rows.float())

    def means(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of complete blocks, [n] -> [n, L, width] fp16, as traces hold them."""
        return (self.sums[blocks.long()] / self.tokens).half()
