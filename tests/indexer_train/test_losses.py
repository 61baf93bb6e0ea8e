"""Every registered loss passes the same tests."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_gen.core.errors import InputError
from indexer_train.losses import LOSSES
from indexer_train.losses.base import Targets


def targets(batch=3, chunks=7, dtype=torch.float64, weight=None):
    generator = torch.Generator().manual_seed(2)
    candidate = torch.rand(batch, chunks, generator=generator) > 0.2
    candidate[:, 0] = False
    mass = torch.rand(batch, chunks, generator=generator).to(dtype) * candidate / chunks
    peak = (mass * 3).clamp_max(1)
    return Targets(mass, peak, candidate, 1 - mass.sum(1), weight)


LISTWISE = ["listwise_mass", "listwise_peak"]
VARIANTS = [
    *((name, {}) for name in sorted(LOSSES)),
    ("bce", {"smoothing": 0.1}),
    ("focal", {"gamma": 0.5}),
    ("focal", {"gamma": 1.0, "alpha": 0.25, "smoothing": 0.1}),
    ("margin", {"margin": 0.3}),
    ("contrastive", {"temperature": 0.1}),
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: " ".join([variant[0], *map(str, variant[1].values())]))
def loss(request):
    name, options = request.param
    return make(name, **options)


def make(name, **options):
    return LOSSES[name](SimpleNamespace(), golden=0.1, **options)


def test_gradient_equals_finite_differences(loss):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    goal, learned = targets(), [*loss.double().parameters()]
    assert torch.autograd.gradcheck(lambda z, *_: loss.compute(z, goal), [logits, *learned])


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return found


def test_no_table_of_pairs_is_built(loss):
    goal = targets(batch=2, chunks=1500, dtype=torch.float32)
    logits = torch.randn(2, 2, 1500, requires_grad=True)
    with Largest() as largest:
        loss.compute(logits, goal).backward()
    assert largest.elements <= 2 * 2 * 1501  # with the slot; pairs would be 1,500 times as many


def test_what_is_no_candidate_does_not_matter(loss):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    changed = torch.where(goal.candidate, logits, torch.randn_like(logits) * 50)
    torch.testing.assert_close(loss.compute(logits, goal), loss.compute(changed, goal))

    def padded(value):
        return torch.nn.functional.pad(value, (0, 5))

    longer = Targets(padded(goal.mass), padded(goal.peak), padded(goal.candidate), goal.protected_mass)
    torch.testing.assert_close(loss.compute(logits, goal), loss.compute(padded(logits), longer))


def test_the_order_of_chunks_does_not_matter(loss):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = Targets(goal.mass[:, order], goal.peak[:, order], goal.candidate[:, order], goal.protected_mass)
    torch.testing.assert_close(loss.compute(logits, goal), loss.compute(logits[..., order], shuffled))


@pytest.mark.parametrize("size", [0.0, 1e3, 1e6])
def test_finite_at_extreme_logits(loss, size):
    signs = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).sign()
    logits = (signs * size).requires_grad_()
    value = loss.compute(logits, targets(dtype=torch.float32))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_training_on_it_ranks_what_was_needed_first(loss):
    goal = targets()
    logits = torch.zeros(1, 3, 7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss.compute(logits, goal).backward()
        optimizer.step()
    for row in range(3):
        best = goal.peak[row].argmax()
        assert logits[0, row, goal.candidate[row]].max() == logits[0, row, best]


def bce(p, truth):
    return -truth * math.log(p) - (1 - truth) * math.log(1 - p)


def focal(p, golden, peak):
    p_truth, alpha = (p, 0.25) if golden else (1 - p, 0.75)
    return alpha * (1 - p_truth) ** 2 * bce(p, 0.9 if golden else 0.1)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("bce", {}, lambda p, golden, peak: bce(p, golden)),
        ("bce", {"smoothing": 0.1}, lambda p, golden, peak: bce(p, 0.9 if golden else 0.1)),
        ("focal", {"gamma": 2.0, "alpha": 0.25, "smoothing": 0.1}, focal),
        ("focal", {}, lambda p, golden, peak: (1 - p if golden else p) ** 2 * bce(p, golden)),
        ("vote_weighted", {}, lambda p, golden, peak: bce(p, golden) * (peak / 0.1 if golden else 1)),
    ],
)
def test_pointwise_losses_equal_the_loop_over_candidates(name, options, value):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    goal = targets(weight=torch.rand(3, 7, dtype=torch.float64, generator=generator))
    assert goal.peak.max() > 0.2 and (goal.peak[goal.candidate] < 0.1).any()
    found = []
    for layer in logits.tolist():
        for row, scores in enumerate(layer):
            for chunk, score in enumerate(scores):
                if goal.candidate[row, chunk]:
                    peak, weight = float(goal.peak[row, chunk]), float(goal.weight[row, chunk])
                    found.append(weight * value(1 / (1 + math.exp(-score)), peak >= 0.1, peak))
    assert float(make(name, **options).compute(logits, goal)) == pytest.approx(sum(found) / len(found), rel=1e-9)


@pytest.mark.parametrize("name", LISTWISE)
def test_listwise_losses_equal_the_loop_over_candidates(name):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    found = []
    for layer in logits.tolist():
        for row, scores in enumerate(layer):
            kept = [chunk for chunk in range(7) if goal.candidate[row, chunk]]
            wanted = [float((goal.mass if name == "listwise_mass" else goal.peak)[row, chunk]) for chunk in kept]
            exponents = [scores[chunk] for chunk in kept]
            if name == "listwise_mass":
                wanted, exponents = [*wanted, float(goal.protected_mass[row])], [*exponents, 0.0]  # the slot
            total = math.log(sum(map(math.exp, exponents)))
            parts = [share / sum(wanted) * (total - score) for share, score in zip(wanted, exponents, strict=True)]
            found.append(sum(parts))
    assert float(make(name).compute(logits, goal)) == pytest.approx(sum(found) / len(found), rel=1e-9)


def pairs(logits, goal, golden, value):
    """Mean of `value(lead)` over all (golden, other) pairs, one at a time."""
    found = []
    for layer in logits:
        for row, scores in enumerate(layer):
            others = [i for i in range(7) if goal.candidate[row, i] and not golden[row, i]]
            found += [value(scores[n] - scores[p]) for p in range(7) if golden[row, p] for n in others]
    return torch.stack(found).mean()


def test_pairwise_losses_equal_the_loop_over_pairs():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    golden = goal.golden(0.1)
    assert golden.any() and not torch.equal(golden, goal.candidate)
    softplus = pairs(logits, goal, golden, torch.nn.functional.softplus)
    torch.testing.assert_close(LOSSES["bpr"](None, 0.1).compute(logits, goal), softplus)
    hinge = pairs(logits, goal, golden, lambda lead: (0.7 + lead).clamp_min(0))
    torch.testing.assert_close(LOSSES["margin"](None, 0.1, margin=0.7).compute(logits, goal), hinge)


def test_contrastive_equals_the_loop_over_positives():
    logits = torch.randn(1, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    golden = goal.golden(0.1)
    found = []
    for row in range(3):
        scores = (logits[0, row] / 0.5).exp()
        negatives = scores[goal.candidate[row] & ~golden[row]].sum()
        found += [-(scores[p] / (scores[p] + negatives)).log() for p in range(7) if golden[row, p]]
    loss = LOSSES["contrastive"](None, 0.1, temperature=0.5)
    torch.testing.assert_close(loss.compute(logits, goal), torch.stack(found).mean(), atol=1e-6, rtol=1e-6)


def test_unknown_options_are_named():
    with pytest.raises(InputError, match=r"loss_options.gamma.*options: smoothing"):
        LOSSES["bce"](None, 0.1, gamma=2)
