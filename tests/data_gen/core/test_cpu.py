"""The linear layer that keeps its gradient's place against torch's own; what torch was told of huge pages."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from data_gen.core import cpu
from data_gen.core.cpu import HUGE_PAGES, ProductLinear, SteadyLinear, keep_freed_memory, multiply_by_product


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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a torch without oneDNN")
def test_a_model_whose_linear_layers_multiply_by_product_is_the_same(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN", True)
    torch.manual_seed(0)
    stock = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 8, bias=False), SteadyLinear(8, 4))
    model = copy.deepcopy(stock)
    multiply_by_product(model)
    assert [type(layer) for layer in model] == [ProductLinear, ProductLinear, SteadyLinear]
    x = torch.randn(2, 3, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))
        assert torch.equal(model.double()(x.double()), stock.double()(x.double()))  # torch's own where product has none
    model(x.double()).sum().backward()
    stock(x.double()).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, stock[0].weight.grad)


def test_where_the_default_library_is_the_faster_one_a_model_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN", False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    multiply_by_product(model)
    assert type(model[0]) is torch.nn.Linear


HUGE = """
import os
from data_gen.core.cpu import ask_for_huge_pages
before = dict(os.environ)
ask_for_huge_pages()
assert os.environ == before
import torch
held = torch.zeros(1 << 24)
print(sum(" hg" in line for line in open("/proc/self/smaps") if line.startswith("VmFlags")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("given", [None, "0"])
def test_huge_pages_are_asked_for_and_nothing_is_left_in_the_environment(given):
    told = {name: value for name, value in os.environ.items() if name != HUGE_PAGES}
    told |= {} if given is None else {HUGE_PAGES: given}
    done = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, env=told, check=True)
    assert (int(done.stdout) > 0) == (given is None)
