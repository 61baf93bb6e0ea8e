"""Muon for the matrices of the layers, AdamW for embeddings, experts, norms, biases and sinks."""

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from recipes.pocket.config import OptimizerConfig


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """Both optimizers; every group names its `factor` on the stage's learning rate and its `param_names`."""
    sides = {False: ([], []), True: ([], [])}  # Muon's parameters: those of the backbone, those of the indexer
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and ".layers." in name and name.endswith(".weight")
        sides[matrix][".indexer." in name].append((name, parameter))
    rates = {False: 1.0, True: config.matrix_lr}
    groups = {
        matrix: [
            {"params": parameters, "factor": rates[matrix] * factor}
            for parameters, factor in zip(pair, (1.0, config.indexer_lr), strict=True)
        ]
        for matrix, pair in sides.items()
    }
    fused = torch.cuda.is_available()
    return [
        AdamW(groups[False], betas=config.betas, weight_decay=config.weight_decay, fused=fused),
        Muon(groups[True], weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]
