"""Swish: values and gradients of one beta and of one per channel, errors, and the layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import functional
from tests.conftest import HAS_TRITON
from tests.layers import everywhere

pytestmark = pytest.mark.usefixtures("on_the_device")

BETAS = {
    "one": ((4, 5, 3), 1),
    "channels": ((4, 5, 3), 5),
    "channels-2d": ((4, 5), 5),
    "channels_last": ((2, 8, 3, 4), 8),
    "0-d": ((), 1),
    "1-d": ((33,), 1),
    "empty": ((0, 5), 5),
}


def composed(x, beta):
    beta = beta.reshape(()) if beta.numel() == 1 else beta.view(-1, *[1] * (x.dim() - 2))
    return x * torch.sigmoid(beta * x)


@everywhere
@pytest.mark.parametrize("case", BETAS)
@pytest.mark.parametrize("learnable", [True, False])
def test_swish(backend, case, learnable):
    shape, num = BETAS[case]
    x = torch.randn(shape, dtype=torch.float64)
    if case == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    layer = fastnorm.Swish(0.7, num, learnable, dtype=torch.float64)
    with torch.no_grad():
        layer.beta += torch.rand(num, dtype=torch.float64)
    y, expected = layer(x), composed(x, layer.beta)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, expected)
    wanted = (x, layer.beta) if learnable else (x,)
    dy = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy)
    )


@everywhere
def test_swish_of_beta_one_is_silu(backend):
    x = torch.randn(100)
    torch.testing.assert_close(functional.swish(x), F.silu(x))
    torch.testing.assert_close(fastnorm.Swish()(x), F.silu(x))
    torch.testing.assert_close(functional.swish(x, 1), functional.silu(x))


@everywhere
def test_swish_of_half_input_with_fp32_beta(backend):
    x = torch.randn(4, 8, 9).half().requires_grad_()
    beta = (torch.rand(8) + 0.5).requires_grad_()
    y = functional.swish(x, beta)
    dx, dbeta = torch.autograd.grad(y, (x, beta), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dbeta.dtype) == (torch.half, torch.half, torch.float32)
    expected = torch.autograd.grad(composed(x.double(), beta.double()).sum(), (x, beta))
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(dbeta, expected[1])


@everywhere
def test_swish_only_betas_gradient(backend):
    x = torch.randn(4, 5, dtype=torch.float64)
    layer = fastnorm.Swish(num_parameters=5, dtype=torch.float64)
    (found,) = torch.autograd.grad(layer(x).sum(), layer.beta)
    s = torch.sigmoid(x)
    torch.testing.assert_close(found, (x * x * s * (1 - s)).sum(0))


# a thread has vectors in several rows of a channel, more than are loaded at once, and some that are
# not there
@pytest.mark.parametrize("beta_count", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.skipif(fastnorm.backends()["cuda"] is not None, reason="no CUDA backend here")
def test_cuda_swish_of_many_vectors_a_thread(beta_count, last, channels):
    x, dy = torch.randn(2, 70, channels, 4, 101)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    beta = torch.rand(channels if beta_count > 1 else 1) + 0.5
    x.requires_grad_(), beta.requires_grad_()
    with fastnorm.backend("cuda"):
        y = functional.swish(x, beta)
        found = torch.autograd.grad(y, (x, beta), dy, retain_graph=True)
        again = torch.autograd.grad(y, (x, beta), dy)
    expected = composed(x.double(), beta.double())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    gradients = torch.autograd.grad(expected, (x, beta), dy.double())
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[1], again[1]), "not deterministic"


def test_swish_gradcheck(backend):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for size in (1, 3):
        beta = torch.rand(size, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(functional.swish, (x, beta))
        assert torch.autograd.gradgradcheck(functional.swish, (x, beta))


@everywhere
@pytest.mark.parametrize(("shape", "betas"), [((4, 5), 4), ((4,), 4), ((4, 5, 3), 3)])
def test_swish_refuses_another_number_of_betas(backend, shape, betas):
    with pytest.raises(ValueError, match="expected beta of one element or of shape"):
        functional.swish(torch.randn(shape), torch.ones(betas))


@everywhere
def test_swish_refuses_another_device(backend):
    with pytest.raises(RuntimeError, match="expected both on the same device"):
        functional.swish(torch.randn(4, 5), torch.ones(5, device="meta"))


def test_swish_layer():
    layer = fastnorm.Swish(0.5, num_parameters=3)
    assert repr(layer) == "Swish(beta=0.5, num_parameters=3, learnable=True)"
    assert list(layer.state_dict()) == ["beta"]
    with torch.no_grad():
        layer.beta.add_(1)
    layer.reset_parameters()
    assert torch.equal(layer.beta, torch.full((3,), 0.5))
    fixed = fastnorm.Swish(learnable=False)
    assert list(fixed.state_dict()) == ["beta"]
    assert not list(fixed.parameters())
    assert repr(fixed) == "Swish(beta=1.0, num_parameters=1, learnable=False)"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.beta, layer.beta)
    with pytest.raises(
        ValueError, match="num_parameters must be 1 or the number of channels, got 0"
    ):
        fastnorm.Swish(num_parameters=0)


@pytest.mark.triton
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_swish_of_many_tiles(monkeypatch):
    from fastnorm.ops import launch
    from fastnorm.ops.batch_norm import plan

    monkeypatch.setattr(plan, "TILE_BYTES", 512)
    x, dy = torch.randn(2, 4, 3, 7, 7).requires_grad_()
    for size in (1, 3):
        beta = (torch.rand(size) + 0.5).requires_grad_()
        with fastnorm.backend("triton"):
            y = functional.swish(x, beta)
            found = torch.autograd.grad(y, (x, beta), dy, retain_graph=True)
            again = torch.autograd.grad(y, (x, beta), dy)
        expected = torch.autograd.grad(composed(x.double(), beta.double()), (x, beta), dy.double())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], again[1]), "not deterministic"
        assert not any(arena.any() for arena in launch._arenas.values())
