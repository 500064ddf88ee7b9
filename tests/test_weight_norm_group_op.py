"""The op pair and the autograd node behind fastnorm.weight_norm_: one call for all layers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm.modules.weight_norm import running
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


@pytest.mark.parametrize("backend", AVAILABLE)
def test_one_call_forward_and_one_backward(backend, x, calls):
    _, model = twins()
    with fastnorm.backend(backend):
        model(x).sum().backward()
    # the unused layer is computed, but has no part in the backward call
    assert calls == [("_forward", 5), ("_backward", 4)]


@pytest.mark.cuda
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
