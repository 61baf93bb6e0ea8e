"""Training batches, generated on the fly: a batch is a function of seed, stage and step, so any step can be remade."""

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.pocket.config import PocketConfig
from recipes.pocket.tasks import training_document
from recipes.pocket.words import Lexicon, build_lexicon


class StageBatches(Dataset):
    """Item `step` is (tokens [B, L] int64, tasks [B, L] int64): the task answered by each token, or -1."""

    def __init__(self, config: PocketConfig, stage: int) -> None:
        self.lexicon: Lexicon = build_lexicon(config.vocabulary)
        self.ids = {word: i for i, word in enumerate(self.lexicon.vocabulary)}
        self.seed, self.stage = config.seed, stage
        self.shape = config.stages[stage]
        self.far = config.far

    def __len__(self) -> int:
        return self.shape.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = Random(f"{self.seed}/{self.stage}/{step}")
        rows, tasks = [], []
        for _ in range(self.shape.batch):
            words, answered = training_document(self.lexicon, self.shape.length - 1, self.far, rng)
            rows.append([self.ids["<bos>"], *(self.ids[word] for word in words)])
            tasks.append([-1, *answered])
        return torch.tensor(rows), torch.tensor(tasks)


def stage_batches(config: PocketConfig, stage: int, start: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches start .. steps-1 of a stage, tokens and tasks [B, S], made by `workers` processes (0: in this one)."""
    batches = StageBatches(config, stage)
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )
