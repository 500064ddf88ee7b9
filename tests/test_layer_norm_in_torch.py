"""Layer norm in torch: saved tensors, torch.func, torch.compile, and the operators themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnorm import dispatch
from fastnorm.ops.layer_norm import layer_norm
from tests.conftest import AVAILABLE as BACKENDS
from tests.layer_norms import randn

TORCH_WARNS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of its own torch.jit.script, and in its tracer


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_may_change_and_the_input_may_not(backend):
    x = randn(4, 40).requires_grad_()
    with dispatch.backend(backend):
        y = layer_norm(x, (40,), randn(40), activation="silu")
        expected = torch.autograd.grad(y, x, randn(4, 40, seed=3), retain_graph=True)
        before = y.grad_fn
        with torch.no_grad():
            y.zero_()
        assert torch.equal(
            torch.autograd.grad(y, x, randn(4, 40, seed=3), retain_graph=True)[0], expected[0]
        )
        assert y.grad_fn is before
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, x, randn(4, 40, seed=3))


@TORCH_WARNS
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func_and_forward_mode(backend):
    x, weight = randn(3, 4, 8), randn(8, seed=1)
    with dispatch.backend(backend):
        torch.testing.assert_close(
            torch.func.vmap(lambda row: layer_norm(row, (8,), weight))(x),
            F.layer_norm(x, (8,), weight),
        )
        _, tangent = torch.func.jvp(
            lambda x: layer_norm(x, (8,), weight), (x,), (torch.ones_like(x),)
        )
        assert tangent.abs().max() < 1e-4


# torch.compile, and the operators themselves


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend):
    x, residual, weight = randn(3, 8), randn(3, 8, seed=1), randn(8, seed=2)
    checks = ("test_schema", "test_faketensor")
    with dispatch.backend(backend):
        mixed = (x, residual.bfloat16(), weight, None, 1, 1e-5, "identity", torch.float32, True)
        torch.library.opcheck(
            torch.ops.fastnorm.layer_norm_forward.default, mixed, test_utils=checks
        )
        forward = (x, residual, weight, weight, 1, 1e-5, "silu", torch.float32, True)
        torch.library.opcheck(
            torch.ops.fastnorm.layer_norm_forward.default, forward, test_utils=checks
        )
        _, statistics, total = torch.ops.fastnorm.layer_norm_forward(*forward)
        backward = (total, x, residual, weight, weight, statistics, 1, "silu", [True, True, True])
        torch.library.opcheck(
            torch.ops.fastnorm.layer_norm_backward.default, backward, test_utils=checks
        )


@TORCH_WARNS
def test_compiles():
    def f(x, residual, weight, bias):
        y, total = layer_norm(
            x, (8,), weight, bias, residual=residual, return_sum=True, activation="silu"
        )
        return y * 2 + total

    inputs = [
        randn(*shape, seed=s).requires_grad_()
        for s, shape in enumerate(((3, 8), (3, 8), (8,), (8,)))
    ]
    with dispatch.backend("reference"):
        found = []
        for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
            out = g(*inputs)
            found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    torch.testing.assert_close(*found)
