"""What benchmarks/masked.py ranks the prompt's chunks by: a trained indexer, baselines, and oracles of the future."""

from collections.abc import Sequence

import torch

from benchmarks.masked import Continuation, Score
from data_gen.core.keys import flatten_heads, mean_pooled_scores
from indexer_train.model import MemoryIndexer


def trained(indexer: MemoryIndexer) -> Score:
    """What the indexer says of the prompt's chunks."""
    layers = indexer.spec.layers

    def score(going: Continuation, row: int) -> torch.Tensor:
        hidden = torch.stack([going.newest[layer][row] for layer in layers])[None].to(torch.bfloat16).float()
        keys = torch.stack([flatten_heads(going.prompt.keys[layer]).half() for layer in layers], dim=1)
        return indexer.joined_scores(hidden, keys, torch.tensor([going.position]))[0]

    return score


def recency(going: Continuation, row: int) -> torch.Tensor:
    """Newest first."""
    return torch.arange(next(iter(going.prompt.keys.values())).shape[1]).float()


def mean_pooled(going: Continuation, row: int) -> torch.Tensor:
    """The backbone's own newest query against mean-pooled keys, averaged over layers: nothing trained."""
    scores = []
    for layer, pooled in going.prompt.keys.items():
        visible = torch.tensor([pooled.shape[1]], device=pooled.device)
        scores.append(mean_pooled_scores(going.contents[layer][row], pooled, 1.0, visible)[0])
    return torch.stack(scores).mean(dim=0)


def foresight(full: Continuation, window: int, peaks: bool, layers: Sequence[int] | None = None) -> Score:
    """The oracle: what a continuation that kept everything, and was watched, needs of the next `window` tokens.

    peaks: by the window's highest head-maximum probability, averaged over layers; else by its mean probability.
    layers: those averaged over, all full-attention ones by default.
    """
    seen = full.watched or {}
    watched = [tuple(map(torch.cat, zip(*seen[layer], strict=True))) for layer in layers or seen]
    highest, mean = (torch.stack(each).mean(dim=0) for each in zip(*watched, strict=True))  # [tokens, N]

    def score(going: Continuation, row: int) -> torch.Tensor:
        first = min(going.read, len(mean) - 1)
        span = slice(first, first + window)
        return highest[span].amax(dim=0) if peaks else mean[span].mean(dim=0)

    return score
