"""The linear layer that keeps its gradient's place against torch's own."""

import copy

import torch

from data_gen.core.cpu import SteadyLinear, keep_freed_memory


def run(layer, batches):
    torch.manual_seed(1)
    for _ in range(batches):
        x = torch.randn(6, 5, requires_grad=True)
        (layer(x) * torch.randn(6, 7)).sum().backward()
    return x.grad


def test_gradients_are_those_of_torch_and_add_up():
    keep_freed_memory()
    ours = SteadyLinear(5, 7)
    stock = torch.nn.Linear(5, 7, bias=False)
    stock.load_state_dict(ours.state_dict())
    for batches in (1, 3):
        for layer in (ours, stock):
            layer.zero_grad()
        torch.testing.assert_close(run(ours, batches), run(stock, batches))
        torch.testing.assert_close(ours.weight.grad, stock.weight.grad)
    x = torch.randn(2, 3, 5)
    assert torch.equal(ours(x), stock(x)) and ours.state_dict().keys() == {"weight"}


def test_a_wide_layer_whose_gradient_is_made_part_by_part():
    ours = SteadyLinear(3000, 200)
    stock = torch.nn.Linear(3000, 200, bias=False)
    stock.load_state_dict(ours.state_dict())
    x, weight = torch.randn(6, 3000, requires_grad=True), torch.randn(6, 200)
    found = []
    for layer in (ours, stock):
        (layer(x) * weight).sum().backward()
        found.append((x.grad, layer.weight.grad))
        x.grad = None
    torch.testing.assert_close(*found)


def test_every_step_writes_to_the_same_place_without_a_copy():
    layer = SteadyLinear(5, 7)
    run(layer, 1)
    place = layer.weight.grad.data_ptr()
    assert place == layer.memory.data_ptr()
    layer.zero_grad()
    assert layer.weight.grad is None
    run(layer, 2)
    assert layer.weight.grad.data_ptr() == place
    other = copy.deepcopy(layer)
    assert other.memory.data_ptr() != place


def test_a_frozen_layer_and_autocast_take_the_usual_way():
    layer = SteadyLinear(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 5)).dtype == torch.bfloat16
    layer.requires_grad_(False)
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, 5))
