"""Bayesian personalised ranking over all (golden, other) pairs of a window."""

from typing import Any

import torch
import torch.nn.functional as F

from indexer_train.losses.base import IndexerLoss, Targets


class BprLoss(IndexerLoss):
    """Ranking: every golden chunk above every other candidate of its window, by as much as can be.

    Over all pairs of a golden chunk p and another candidate n of one window, per layer:

        -log sigmoid(z_p - z_n)

    averaged over the pairs, so that windows with many of them count more. Scores have no zero: serve by budget, or
    calibrate a threshold.

    Labels: golden, the candidates whose peak (or votes) reaches `train.golden`.
    Requires: a golden chunk in some window.
    Source: Rendle et al. 2009, "BPR: Bayesian Personalized Ranking from Implicit Feedback" (arXiv 1205.2618),
    BPR-Opt; the release's training/train.py, --pairwise-loss bpr.
    Used by: recipe smollm2-quickstart.
    """

    def compute(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        golden = targets.golden(self.golden)
        most = int(golden.sum(dim=-1).max()) if targets.most is None else targets.most
        total = _PairwiseSoftplus.apply(logits, golden, targets.candidate & ~golden, most)
        pairs = len(logits) * (golden.sum(dim=-1) * (targets.candidate & ~golden).sum(dim=-1)).sum()
        return total / pairs.clamp_min(1)


class _PairwiseSoftplus(torch.autograd.Function):
    """Sum of softplus(z_n - z_p) over pairs, one golden chunk of every window at a time.

    Loss and gradient are made in the same pass, so that memory is a few [L, B, N], never [B, N, N].
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, golden: torch.Tensor, negative: torch.Tensor, most: int
    ) -> torch.Tensor:
        gradient = torch.zeros_like(logits)
        total = logits.new_zeros(())
        ranked = golden.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices  # golden chunks first
        for turn in range(most):
            chunk = ranked[:, turn].expand(len(logits), -1)[..., None]
            pair = negative & (golden.sum(dim=-1, keepdim=True) > turn)
            lead = logits - logits.gather(-1, chunk)
            total += torch.where(pair, F.softplus(lead), 0.0).sum()
            slope = torch.where(pair, torch.sigmoid(lead), 0.0)
            gradient += slope
            gradient.scatter_add_(-1, chunk, -slope.sum(dim=-1, keepdim=True))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad_outputs[0], None, None, None
