"""How a grouped layer's weight is read in a forward: what torch's way to it does is not lost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastnorm
from tests.conftest import AVAILABLE
from tests.weight_norm_models import Model, assert_same_gradients, counted_calls, twins

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE])


@pytest.fixture
def x():
    return torch.randn(2, 3, 6)


@pytest.fixture
def entered(monkeypatch):
    """A list that gets every ParametrizationList whose forward is called."""
    found = []
    forward = parametrize.ParametrizationList.forward
    monkeypatch.setattr(
        parametrize.ParametrizationList,
        "forward",
        lambda self: (found.append(self), forward(self))[1],
    )
    return found


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_forward_calls_no_parametrization(backend, x, entered):
    alone, grouped = twins()
    with fastnorm.backend(backend):
        y = grouped(x)
        assert entered == []
        torch.testing.assert_close(y, alone(x))
        assert entered != []
        copied = copy.deepcopy(grouped)
        entered.clear()
        torch.testing.assert_close(copied(x), y)
    assert entered == []


@pytest.mark.parametrize("where", ["chain", "parametrization", "everywhere"])
def test_hooks_of_the_parametrization_are_called(where, x):
    _, model = twins()
    chain, seen = model.up.parametrizations.weight, []

    def hook(module, inputs, output):
        seen.append(module)

    with fastnorm.backend("reference"):
        if where == "everywhere":
            handle = nn.modules.module.register_module_forward_hook(hook)
        else:
            target = chain if where == "chain" else chain[0]
            handle = target.register_forward_hook(hook)
        model(x)
        handle.remove()
        assert (chain[0] if where == "parametrization" else chain) in seen
        seen.clear()
        model(x)
    assert seen == []


def test_a_forward_of_the_parametrizations_own_is_called(x):
    alone, model = twins()
    norm = model.last.parametrizations.weight[0]
    norm.forward = lambda g, v: torch.zeros_like(v)
    with fastnorm.backend("reference"):
        torch.testing.assert_close(model(x)[0], alone.last.bias)
        del norm.forward
        torch.testing.assert_close(model(x), alone(x))


def test_another_on_top_and_a_cache(x):
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    alone, grouped = twins()
    with fastnorm.backend("reference"):
        for model in (alone, grouped):
            parametrize.register_parametrization(model.up, "weight", Double())
        torch.testing.assert_close(grouped(x), alone(x))
        with parametrize.cached():
            torch.testing.assert_close(grouped(x), alone(x))


def test_assignment_removal_and_restoration(x, entered):
    model = fastnorm.weight_norm_(Model())  # no copy: torch's removal takes it from copies too
    with fastnorm.backend("reference"), torch.no_grad():
        new = torch.randn_like(model.last.weight)
        model.last.weight = new
        torch.testing.assert_close(model.last.weight, new)
        expected = model(x)
        fastnorm.remove_weight_norm(model.last)
        assert type(model.last) is nn.Linear
        torch.testing.assert_close(model(x), expected)
        fastnorm.restore_(model)
        entered.clear()
        torch.testing.assert_close(model(x), expected)
    assert len(set(entered)) == 3


# the reference's weights are views, which autograd lets nobody change
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "reference"])
def test_a_weight_changed_in_place_is_that_one_alone(backend, x):
    """What a group computed are tensors of their own, in autograd too."""

    class Changing(Model):
        def forward(self, x):
            weights = self.first.weight, self.last.weight
            before = weights[1].clone()
            weights[0].mul_(3)
            assert torch.equal(weights[1], before)
            return weights[0].square().sum() + weights[1].square().sum()

    alone = Changing()
    grouped = fastnorm.weight_norm_(copy.deepcopy(alone))
    with fastnorm.backend(backend):
        for model in (alone, grouped):
            model(x).backward()
    assert_same_gradients(alone, grouped)


def _half_and_back(model):
    model.half().float()


def _others(model):
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value * 1.5))


def _data(model):
    for p in model.parameters():
        p.data = p.data.clone().mul_(1.5)


def _strided(model):
    for p in model.parameters():
        p.data = p.data.mT.contiguous().mT if p.dim() > 1 else p.data


def _tied(model):
    model.unused.parametrizations.weight = model.last.parametrizations.weight
    model.first.parametrizations.weight.original0 = nn.Parameter(torch.rand(8, 1, 1))


@everywhere
@pytest.mark.parametrize("change", [_half_and_back, _others, _data, _strided, _tied])
def test_parameters_changed_between_forwards_are_noticed(backend, change, x):
    _, grouped = twins()
    with fastnorm.backend(backend):
        grouped(x).sum().backward()
        grouped.zero_grad()
        change(grouped)
        alone = copy.deepcopy(grouped)
        fastnorm.modules.weight_norm_group.ungroup(alone)
        for model in (alone, grouped):
            model(x).square().sum().backward()
    assert_same_gradients(alone, grouped)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_graph_of_torch_fx_holds_parameters_and_no_weights(x):
    alone, grouped = twins()
    graph = torch.fx.symbolic_trace(nn.Sequential(grouped))
    with torch.no_grad():
        for model in (alone, grouped):
            model.last.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(graph(x), alone(x))


def test_calls_are_still_counted_by_layer(x, monkeypatch):
    calls = counted_calls(monkeypatch)
    _, model = twins()
    with fastnorm.backend("reference"), torch.no_grad():
        model(x)
    assert calls == [("_forward", 5)]
