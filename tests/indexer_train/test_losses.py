"""Every registered loss passes the same tests."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_gen.errors import InputError
from indexer_train.losses import LOSSES
from indexer_train.losses.base import Targets


def targets(batch=3, chunks=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    candidate = torch.rand(batch, chunks, generator=generator) > 0.2
    candidate[:, 0] = False
    mass = torch.rand(batch, chunks, generator=generator).to(dtype) * candidate / chunks
    peak = (mass * 3).clamp_max(1)
    return Targets(mass, peak, candidate, 1 - mass.sum(1))


JOINED = ["listwise_mass", "listwise_peak"]


@pytest.fixture(params=[*sorted(LOSSES), *(f"{name} joined" for name in JOINED)])
def loss(request):
    return make(*request.param.split())


def make(name, joined="", join="sum"):
    model = SimpleNamespace(spec=SimpleNamespace(shape=SimpleNamespace(join=join)))
    return LOSSES[name](model, golden=0.1, **({"joined": True} if joined else {}))


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


@pytest.mark.parametrize("join", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", JOINED)
def test_a_joined_loss_is_that_of_the_joined_score(name, join):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    joined = {"sum": logits.sum(0), "mean": logits.mean(0), "max": logits.amax(0)}[join]
    expected = make(name).compute(joined[None], targets())
    torch.testing.assert_close(make(name, "joined", join).compute(logits, targets()), expected)
    assert not torch.isclose(make(name).compute(logits, targets()), expected)


def test_what_is_no_candidate_does_not_matter(loss):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    changed = torch.where(goal.candidate, logits, torch.randn_like(logits) * 50)
    torch.testing.assert_close(loss.compute(logits, goal), loss.compute(changed, goal))

    def padded(value):
        return torch.nn.functional.pad(value, (0, 5))

    longer = Targets(padded(goal.mass), padded(goal.peak), padded(goal.candidate), goal.protected)
    torch.testing.assert_close(loss.compute(logits, goal), loss.compute(padded(logits), longer))


def test_the_order_of_chunks_does_not_matter(loss):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    goal = targets()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = Targets(goal.mass[:, order], goal.peak[:, order], goal.candidate[:, order], goal.protected)
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


def test_focal_without_focus_is_bce_and_unknown_options_are_named():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = LOSSES["bce"](None, 0.1, smoothing=0.1).compute(logits, targets())
    torch.testing.assert_close(LOSSES["focal"](None, 0.1, gamma=0, smoothing=0.1).compute(logits, targets()), plain)
    halved = LOSSES["focal"](None, 0.1, gamma=0, alpha=0.5, smoothing=0.1).compute(logits, targets())
    torch.testing.assert_close(halved, plain / 2)
    with pytest.raises(InputError, match=r"loss_options.gamma.*options: smoothing"):
        LOSSES["bce"](None, 0.1, gamma=2)
