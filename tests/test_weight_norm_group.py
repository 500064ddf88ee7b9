"""fastnorm.weight_norm_: a model's weight-normed layers computed together once per forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastnorm
from fastnorm.modules.weight_norm import WeightNorm, running
from tests.conftest import AVAILABLE
from tests.weight_norm_models import assert_same_gradients, counted_calls, twins

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE])


@pytest.fixture
def x():
    return torch.randn(2, 3, 6)


@pytest.fixture
def calls(monkeypatch):
    return counted_calls(monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_stays():
    yield
    assert running.calls == []


@everywhere
@pytest.mark.parametrize("wrap", [fastnorm.weight_norm, parametrizations.weight_norm])
def test_numbers_gradients_and_names_are_those_of_the_layers_alone(backend, wrap, x):
    alone, grouped = twins(wrap)
    assert list(alone.state_dict()) == list(grouped.state_dict())
    with fastnorm.backend(backend):
        y, z = alone(x), grouped(x)
        torch.testing.assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
    assert_same_gradients(alone, grouped)
    assert grouped.unused.parametrizations.weight.original0.grad is None
    assert all(isinstance(m.parametrizations.weight[0], WeightNorm) for m in grouped.children())


@everywhere
def test_outside_of_a_forward_a_weight_computes_alone(backend, x, calls):
    alone, grouped = twins()
    with fastnorm.backend(backend):
        grouped(x)
        calls.clear()
        torch.testing.assert_close(grouped.twice.weight, alone.twice.weight)
        grouped.first(x).sum().backward()
    assert calls == []
    assert grouped.first.parametrizations.weight.original1.grad is not None
    assert grouped.last.parametrizations.weight.original1.grad is None


@everywhere
def test_two_forwards_before_one_backward(backend, x):
    alone, grouped = twins()
    with fastnorm.backend(backend):
        for model in (alone, grouped):
            (model(x).sum() + model(2 * x).square().sum()).backward()
    assert_same_gradients(alone, grouped)


@everywhere
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_weights(backend, error, x):
    _, model = twins()

    def fail(*_):
        raise error("as planned")

    handle = model.up.register_forward_pre_hook(fail)
    with fastnorm.backend(backend):
        with pytest.raises(error, match="as planned"):
            model(x)
        if error is ValueError:
            assert running.calls == []
        handle.remove()
        # after an interrupt torch calls no hook: the next forward clears up
        with torch.no_grad():
            model.last.parametrizations.weight.original0.mul_(2)
            torch.testing.assert_close(model.last.weight, copy.deepcopy(model).last.weight)
        model(x).sum().backward()


def test_an_interrupted_call_inside_another_is_told_from_that(x):
    _, model = twins()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.own = fastnorm.weight_norm(nn.Linear(5, 5))

        def forward(self, x):
            handle = model.up.register_forward_pre_hook(self.interrupt)
            with pytest.raises(KeyboardInterrupt):
                self.inner(x)
            handle.remove()
            assert [call.model for call in running.calls] == [self, model]
            y = self.inner(x)
            assert [call.model for call in running.calls] == [self]
            assert self.own.weight is self.own.weight
            return self.own(y)

        def interrupt(self, *_):
            raise KeyboardInterrupt

    fastnorm.weight_norm_(Outer())(x)


@everywhere
def test_grad_mode_and_changes_inside_a_forward(backend, x):
    alone, grouped = twins()

    class Changing(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            layer = self.model.last
            kept = layer.weight
            with torch.no_grad():
                assert not layer.weight.requires_grad
                layer.parametrizations.weight.original0.mul_(3)
            with torch.inference_mode():
                assert not layer.weight.requires_grad
            return self.model(x), kept, layer.weight

    with fastnorm.backend(backend):
        expected = Changing(alone)(x)
        found = fastnorm.weight_norm_(Changing(grouped))(x)
        for y, z in zip(expected, found, strict=True):
            torch.testing.assert_close(z, y)
        assert found[2].requires_grad
        with torch.no_grad():
            assert not grouped(x).requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(grouped(x), alone(x))

        # no gradient at first, then one inside
        class Enabling(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                with torch.inference_mode(False), torch.enable_grad():
                    return self.model.last(x.clone())

        for context in (torch.no_grad, torch.inference_mode):
            model = fastnorm.weight_norm_(Enabling(copy.deepcopy(alone)))
            with context():
                y = model(torch.ones(2, 4))
            y.sum().backward()
            assert model.model.last.parametrizations.weight.original1.grad is not None


def test_nested_groups_and_a_model_that_calls_itself(x, calls):
    alone, grouped = twins()

    class Recursive(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.again = True

        def forward(self, x):
            self.again = not self.again
            return self.model(x) if self.again else self(x) + self.model(x)

    with fastnorm.backend("reference"):
        expected = Recursive(alone)(x)
        found = fastnorm.weight_norm_(Recursive(grouped))(x)
        expected.sum().backward()
        found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert_same_gradients(alone, grouped)
    assert calls == [("_forward", 5), ("_backward", 4)]


def test_calling_it_again_finds_new_layers(calls, x):
    _, model = twins()
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    parametrize.remove_parametrizations(model.unused, "weight")
    model.last = fastnorm.weight_norm(nn.Linear(4, 6), dim=1)
    model.more = fastnorm.weight_norm(nn.Linear(4, 6))
    assert fastnorm.weight_norm_(model) is model
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    with fastnorm.backend("reference"):
        model(x)
    assert calls == [("_forward", 5)]


def test_shared_parameters_and_shared_layers():
    layer = fastnorm.weight_norm(nn.Linear(4, 4))
    other = fastnorm.weight_norm(nn.Linear(4, 4))
    other.parametrizations.weight.original1 = layer.parametrizations.weight.original1
    alone = nn.Sequential(layer, other, layer)
    grouped = fastnorm.weight_norm_(copy.deepcopy(alone))
    with fastnorm.backend("reference"):
        for model in (alone, grouped):
            model(torch.ones(2, 4)).square().sum().backward()
    assert_same_gradients(alone, grouped)


def test_other_parametrizations_on_top_and_beside():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = fastnorm.weight_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(layer, "weight", Double())
    alone = nn.Sequential(layer, parametrizations.orthogonal(nn.Linear(4, 4)))
    grouped = fastnorm.weight_norm_(copy.deepcopy(alone))
    x = torch.randn(2, 4)
    with fastnorm.backend("reference"):
        torch.testing.assert_close(grouped(x), alone(x))
        with parametrize.cached():
            torch.testing.assert_close(grouped(x), alone(x))
            assert grouped[0].weight is grouped[0].weight


def with_an_empty_weight():
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(3, 0)
    model = nn.Sequential(fastnorm.weight_norm(nn.Linear(3, 3)), fastnorm.weight_norm(empty))
    return fastnorm.weight_norm_(model)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_empty_weights(backend):
    model = with_an_empty_weight()
    with fastnorm.backend(backend):
        assert model(torch.zeros(2, 3)).shape == (2, 0)


def test_tensors_that_are_not_plain():
    meta = fastnorm.weight_norm_(copy.deepcopy(with_an_empty_weight())).to("meta")
    assert meta(torch.zeros(2, 3, device="meta")).shape == (2, 0)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fastnorm.weight_norm_(nn.Sequential(fastnorm.weight_norm(nn.Linear(3, 3))))
        assert fake(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_errors():
    with pytest.raises(ValueError, match=r"Linear has no weight-normed layer .* first"):
        fastnorm.weight_norm_(nn.Linear(3, 3))
    former = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="1 have torch's former weight norm"):
        fastnorm.weight_norm_(former)
    for wrong in (None, torch.zeros(3), nn.Linear):
        with pytest.raises(TypeError, match="weight_norm_"):
            fastnorm.weight_norm_(wrong)

    class Other(parametrizations._WeightNorm):
        def forward(self, g, v):
            return g * v

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Other(), unsafe=True)
    with pytest.raises(ValueError, match="no weight-normed layer that can be computed together"):
        fastnorm.weight_norm_(layer)
    assert not layer._forward_pre_hooks
    _, model = twins()
    model.last.parametrizations.weight.original0 = nn.Parameter(torch.ones(3, 1))
    with fastnorm.backend("reference"), pytest.raises(RuntimeError, match=r"shape \[5, 1\]"):
        model(torch.zeros(2, 3, 6))
