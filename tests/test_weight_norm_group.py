"""fastnorm.weight_norm_: a model's weight-normed layers computed together once per forward."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastnorm
from fastnorm.modules.weight_norm import WeightNorm, running
from fastnorm.ops.weight_norm import group as family
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


@pytest.mark.parametrize("backend", AVAILABLE)
def test_one_call_forward_and_one_backward(backend, x, calls):
    _, model = twins()
    with fastnorm.backend(backend):
        model(x).sum().backward()
    # the unused layer is computed, but has no part in the backward call
    assert calls == [("_forward", 5), ("_backward", 4)]


@pytest.mark.skipif("cuda" not in AVAILABLE or torch.cuda.is_available(), reason="counts launches")
def test_one_launch_forward_and_one_backward(x):
    _, model = twins()
    engine = sys.modules["fastnorm._cuda"].engine
    with fastnorm.backend("cuda"):
        before = engine.launches
        y = model(x).sum()
        assert engine.launches == before + 1
        y.backward()
        assert engine.launches == before + 2


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


@pytest.mark.parametrize("backend", AVAILABLE)
def test_double_backward(backend, x):
    alone, grouped = twins()
    alone, grouped, x = alone.double(), grouped.double(), x.double()
    with fastnorm.backend(backend):
        for model in (alone, grouped):
            used = [p for name, p in model.named_parameters() if "unused" not in name]
            first = torch.autograd.grad(model(x).square().sum(), used, create_graph=True)
            sum(g.square().sum() for g in first).backward()
    assert_same_gradients(alone, grouped)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_gradcheck_of_the_function(backend):
    v = [torch.randn(3, 4).double(), torch.randn(2, 3, 2).double(), torch.randn(5).double()]
    g = [torch.rand(3, 1).double(), torch.rand(1, 3, 1).double(), torch.rand(()).double()]
    inputs = [x.requires_grad_() for x in (*v, *g)]

    def function(*inputs):
        return tuple(
            family.weight_norm_group(inputs[:3], inputs[3:], (0, 1, None), (None, 2.5, 1e-3))
        )

    with fastnorm.backend(backend):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_ops_pass_opcheck(backend):
    v = [torch.randn(4, 6).bfloat16(), torch.randn(2, 3, 2)]
    g = [torch.rand(4, 1).bfloat16(), torch.rand(1, 3, 1)]
    utils = {"test_utils": ("test_schema", "test_faketensor")}
    ops = torch.ops.fastnorm
    with fastnorm.backend(backend):
        w, norm = family._forward(v, g, [0, 1], [0.0, 0.0])
        assert (norm.dtype, norm.shape) == (torch.float32, (7,))
        torch.library.opcheck(
            ops.weight_norm_group_forward.default, (v, g, [0, 1], [0.0, 1e-3]), **utils
        )
        torch.library.opcheck(
            ops.weight_norm_group_backward.default,
            (v, g, norm, w, [0, 4], [0, 1], [0.0, 0.0], [True, False], [True, True]),
            **utils,
        )


@everywhere
def test_frozen_layers_and_frozen_parts_of_layers(backend, x):
    alone, grouped = twins()
    for model in (alone, grouped):
        model.first.requires_grad_(False)
        model.twice.parametrizations.weight.original0.requires_grad_(False)
        model.last.parametrizations.weight.original1.requires_grad_(False)
    seen = []
    grouped.first.register_forward_hook(lambda m, _, __: seen.append(m.weight.requires_grad))
    with fastnorm.backend(backend):
        for model in (alone, grouped):
            model(x).square().sum().backward()
    assert seen == [False]
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


@pytest.mark.parametrize("backend", AVAILABLE)
def test_layers_of_different_dtypes_and_after_half(backend, x, calls):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                fastnorm.weight_norm(nn.Linear(4, 4).to(dtype))
                for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float64)
            )

        def forward(self, x):
            return sum(layer(x.to(layer.bias.dtype)).float() for layer in self.layers)

    alone = Mixed()
    grouped = fastnorm.weight_norm_(copy.deepcopy(alone))
    x = torch.randn(2, 4)
    with fastnorm.backend(backend):
        for model in (alone, grouped):
            model(x).square().sum().backward()
        assert_same_gradients(alone, grouped)
        # fp32 and bf16 are both computed in fp32
        assert sorted(calls) == [("_backward", 2)] * 2 + [("_forward", 2)] * 2
        calls.clear()
        alone.half(), grouped.half()
        torch.testing.assert_close(grouped(x), alone(x), rtol=1e-2, atol=1e-2)
    assert calls == [("_forward", 4)]


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


def test_empty_weights_and_tensors_that_are_not_plain():
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(3, 0)
    model = nn.Sequential(fastnorm.weight_norm(nn.Linear(3, 3)), fastnorm.weight_norm(empty))
    fastnorm.weight_norm_(model)
    for backend in AVAILABLE:
        with fastnorm.backend(backend):
            assert model(torch.zeros(2, 3)).shape == (2, 0)
    meta = fastnorm.weight_norm_(copy.deepcopy(model)).to("meta")
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
