"""Activations in place: torch's values and gradients, its errors, and its count of changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnorm import functional
from tests.activations import LAYOUTS, TORCHS
from tests.layers import everywhere

pytestmark = pytest.mark.usefixtures("on_the_device")

INPLACE = {"silu": F.silu, "selu": F.selu}


@everywhere
@pytest.mark.parametrize("name", INPLACE)
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded"}))  # which is refused
def test_in_place_values(backend, name, layout):
    x = LAYOUTS[layout]()
    expected, strides = INPLACE[name](x), x.stride()
    y = getattr(functional, name)(x, inplace=True)
    assert y is x
    assert x.stride() == strides
    torch.testing.assert_close(x, expected)


@everywhere
def test_in_place_leaves_the_rest_of_a_slice_alone(backend):
    whole = torch.randn(4, 9)
    before = whole.clone()
    functional.silu(whole[:, 2:7], inplace=True)
    torch.testing.assert_close(whole[:, 2:7], F.silu(before[:, 2:7]))
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, 7:], before[:, 7:])


@everywhere
def test_in_place_of_an_expanded_tensor_is_refused(backend):
    x = torch.randn(1, 5).expand(4, 5)
    with pytest.raises(RuntimeError, match="single memory location"):
        functional.silu(x, inplace=True)


@everywhere
@pytest.mark.parametrize("name", [*INPLACE, "gelu", "relu6"])
@pytest.mark.parametrize("sliced", [True, False])
def test_in_place_gradients(backend, name, sliced):
    leaf = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)

    def step(function):
        x = leaf * 1
        y = function(x[:, 2:7] if sliced else x)
        loss = (x * x).sum() + (
            y * y * y
        ).sum()  # through the overwritten tensor, and through the result
        (dx,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return dx, torch.autograd.grad(dx.pow(2).sum(), leaf)[0]

    def torchs(x):
        return x.copy_(TORCHS[name](x.clone()))

    found = step(lambda x: functional.activation(x, name, inplace=True))
    torch.testing.assert_close(found, step(torchs))


@everywhere
def test_in_place_of_a_leaf_is_torchs_error(backend):
    text = "a leaf Variable that requires grad is being used in an in-place operation."
    for function in (functional.silu, functional.selu, F.silu):
        with pytest.raises(RuntimeError, match=text):
            function(torch.randn(3, requires_grad=True), inplace=True)
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert functional.silu(x, inplace=True) is x


@everywhere
def test_in_place_counts_as_a_change(backend):
    x = torch.randn(5, requires_grad=True) * 1
    y = x.exp()  # saves its result
    functional.silu(y, inplace=True)
    z = x.sin()
    before = x._version
    functional.silu(x, inplace=True)
    assert x._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_input_changed_before_backward(backend):
    x = torch.randn(5, requires_grad=True) * 1
    y = functional.silu(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
