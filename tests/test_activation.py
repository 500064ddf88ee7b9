"""Activations: values and slopes against fp64, switch points, limits, layouts, derivatives.

What hard piecewise functions have for the *gradient* at NaN is in no table here: torch's own scalar
and vector CPU kernels disagree about it.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.activations import LAYOUTS, TORCHS
from tests.compare import assert_as_good_as_torch
from tests.conftest import HAS_TRITON
from tests.layers import everywhere

pytestmark = pytest.mark.usefixtures("on_the_device")
numpy_warns = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of the interpreter's infinities
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and Dynamo
every_name = pytest.mark.parametrize("name", NAMES)

INF, NAN = math.inf, math.nan
SIZES = (31, 32, 33, 49, 4097)  # around a vector, and more than one block of every dtype
MODULES = [(nn.GELU, fastnorm.GELU), (nn.SiLU, fastnorm.SiLU), (nn.SELU, fastnorm.SELU)]


def value_and_slope(function, x):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


def test_every_list_has_the_same_names():
    assert list(TORCHS) == list(NAMES) == list(reference.ACTIVATIONS)
    if HAS_TRITON:
        from fastnorm.ops.activation.triton import ACTIVATIONS

        assert list(ACTIVATIONS) == list(NAMES)


# values


@numpy_warns
@every_name
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.half, torch.bfloat16], ids=str
)
def test_values_and_gradients(backend, name, dtype):
    for size in SIZES:
        x = (torch.randn(size) * 3).to(dtype).requires_grad_()
        dy = torch.randn(size).to(dtype)
        ours = lambda x: functional.activation(x, name)  # noqa: E731
        torchs = lambda x: TORCHS[name](x)  # noqa: E731
        assert_as_good_as_torch(ours, torchs, {"x": x}, dy, f"{name} {size}")


# those of SIZES have one vector a thread: two and four, with a ragged end
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(200_003, torch.float64), (400_001, torch.float32), (800_003, torch.float32)],
    ids=str,
)
def test_several_vectors_a_thread(backend, monkeypatch, size, dtype):
    if backend == "triton":  # the interpreter takes 5 ms a program
        monkeypatch.setattr("fastnorm.ops.activation.triton.SMALL_GRID", 0)
        size //= 50
    x, dy = torch.randn(2, size, dtype=dtype)
    ours, torchs = (lambda x: functional.silu(x)), (lambda x: F.silu(x))
    assert_as_good_as_torch(ours, torchs, {"x": x.requires_grad_()}, dy)


# x, y, slope: where a piecewise function switches, both sides of it, and what rounds to nothing
SWITCHES = {
    "relu": [(0.0, 0.0, 0.0), (-0.0, 0.0, 0.0), (1e-30, 1e-30, 1.0), (-1e-30, 0.0, 0.0)],
    "relu6": [
        (0.0, 0.0, 0.0),
        (6.0, 6.0, 0.0),
        (5.75, 5.75, 1.0),
        (6.25, 6.0, 0.0),
        (0.25, 0.25, 1.0),
    ],
    "leaky_relu": [(0.0, 0.0, 0.01), (1e-30, 1e-30, 1.0), (-1.0, -0.01, 0.01)],
    "elu": [(0.0, 0.0, 1.0), (-1e-30, -1e-30, 1.0), (-200.0, -1.0, 0.0), (1e-30, 1e-30, 1.0)],
    "selu": [(0.0, 0.0, 1.7580993408473766), (1.0, 1.0507009873554805, 1.0507009873554805)],
    "hardswish": [
        (3.0, 3.0, 1.0),
        (-3.0, 0.0, 0.0),
        (0.0, 0.0, 0.5),
        (4.0, 4.0, 1.0),
        (-4.0, 0.0, 0.0),
    ],
    "mish": [(20.0, 20.0, 1.0), (21.0, 21.0, 1.0), (0.0, 0.0, 0.6)],
    "gelu": [(0.0, 0.0, 0.5), (30.0, 30.0, 1.0), (-40.0, 0.0, 0.0)],
    "gelu_tanh": [(0.0, 0.0, 0.5), (30.0, 30.0, 1.0), (-40.0, 0.0, 0.0)],
    "gelu_sigmoid": [(0.0, 0.0, 0.5), (30.0, 30.0, 1.0), (-200.0, 0.0, 0.0)],
    "silu": [(0.0, 0.0, 0.5), (60.0, 60.0, 1.0), (-200.0, 0.0, 0.0)],
    "tanh": [(0.0, 0.0, 1.0), (30.0, 1.0, 0.0), (-30.0, -1.0, 0.0), (1e-20, 1e-20, 1.0)],
    "sigmoid": [(0.0, 0.5, 0.25), (200.0, 1.0, 0.0), (-200.0, 0.0, 0.0)],
    "identity": [(0.0, 0.0, 1.0), (-1e30, -1e30, 1.0)],
}


@everywhere
@numpy_warns
@every_name
def test_where_functions_switch(backend, name):
    x, y, slope = torch.tensor(SWITCHES[name]).unbind(1)
    found = value_and_slope(lambda x: functional.activation(x, name), x)
    torch.testing.assert_close(found[0], y, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(found[1], slope, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[1], value_and_slope(TORCHS[name], x)[1], rtol=1e-6, atol=1e-7)


SELU_LOW, SELU_HIGH = -1.7580993408473766, 1.0507009873554805

# at -inf, at +inf
LIMITS = {
    "identity": (-INF, INF),
    "relu": (0.0, INF),
    "relu6": (0.0, 6.0),
    "leaky_relu": (-INF, INF),
    "elu": (-1.0, INF),
    "selu": (SELU_LOW, INF),
    "gelu": (NAN, INF),
    "gelu_tanh": (NAN, INF),
    "gelu_sigmoid": (NAN, INF),
    "silu": (NAN, INF),
    "hardswish": (NAN, INF),
    "mish": (NAN, INF),
    "tanh": (-1.0, 1.0),
    "sigmoid": (0.0, 1.0),
}
# slope at -inf, at +inf, at 0
SLOPES = {
    "identity": (1.0, 1.0, 1.0),
    "gelu": (NAN, NAN, 0.5),
    "gelu_tanh": (NAN, NAN, 0.5),
    "gelu_sigmoid": (NAN, NAN, 0.5),
    "silu": (NAN, NAN, 0.5),
    "selu": (0.0, SELU_HIGH, -SELU_LOW),
    "elu": (0.0, 1.0, 1.0),
    "relu": (0.0, 1.0, 0.0),
    "relu6": (0.0, 0.0, 0.0),
    "leaky_relu": (0.01, 1.0, 0.01),
    "hardswish": (0.0, 1.0, 0.5),
    "tanh": (0.0, 0.0, 1.0),
    "sigmoid": (0.0, 0.0, 0.25),
}


@everywhere
@numpy_warns
@every_name
def test_limits(backend, name):
    # torch's vectorised CPU kernel has NaN for gelu(inf) in fp32; inf in fp64 and one by one
    dtype = torch.float64 if name == "gelu" and backend != "triton" else torch.float32
    x = torch.tensor([-INF, INF, NAN], dtype=dtype)
    y, _ = value_and_slope(lambda x: functional.activation(x, name), x)
    torch.testing.assert_close(y, torch.tensor([*LIMITS[name], NAN], dtype=dtype), equal_nan=True)


@everywhere
@numpy_warns
@pytest.mark.parametrize("name", SLOPES)
def test_slopes_at_the_limits(backend, name):
    x = torch.tensor([-INF, INF, 0.0])
    _, slope = value_and_slope(lambda x: functional.activation(x, name), x)
    torch.testing.assert_close(slope, torch.tensor(SLOPES[name]), equal_nan=True)


# layouts, shapes, dtypes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed_dy", [True, False])
def test_layouts(backend, layout, transposed_dy):
    x = LAYOUTS[layout]().requires_grad_()
    y = functional.gelu(x)
    dy = torch.randn(x.shape)
    if transposed_dy and x.dim() > 1:
        dy = torch.randn(x.shape[::-1]).permute(*reversed(range(x.dim())))
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = F.gelu(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0])
    dense = layout not in ("sliced", "expanded")
    assert y.stride() == (x.stride() if dense else x.contiguous().stride())
    assert y.data_ptr() != x.data_ptr() or not y.numel()


@everywhere
@pytest.mark.parametrize("function", ["gelu", "silu", "selu", "swish"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_are_refused(backend, function, dtype):
    x = torch.ones(4, dtype=dtype)
    if backend == "auto" and function == "silu" and dtype == torch.complex64:
        torch.testing.assert_close(functional.silu(x), F.silu(x))  # torch's own, which serves it
        return
    with pytest.raises((NotImplementedError, RuntimeError), match=r"not implemented|not supported"):
        getattr(functional, function)(x)
    if backend != "auto" and function != "selu":
        with pytest.raises(NotImplementedError):
            getattr(functional, function)(x)


@everywhere
def test_identity_is_a_copy(backend):
    x = torch.randn(5)
    for name in (None, "identity"):
        y = functional.activation(x, name)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
        assert functional.activation(x, name, inplace=True) is x


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"unknown activation 'swoosh': choose one of identity, relu,"
    ):
        functional.activation(torch.randn(3), "swoosh")


@everywhere
def test_gelu_refuses_another_approximation(backend):
    """At the call, not in the constructor, and with the choices: as torch does it."""
    layer = fastnorm.GELU("cubic")
    with pytest.raises(RuntimeError, match="one of none, tanh, sigmoid, got 'cubic'"):
        layer(torch.randn(3))
    with pytest.raises(RuntimeError):
        nn.GELU("cubic")(torch.randn(3))


def test_autocast_leaves_activations_alone(backend, device):
    with torch.autocast(device, dtype=torch.bfloat16):
        assert functional.gelu(torch.randn(5)).dtype == torch.float32
        assert functional.gelu(torch.randn(5).half()).dtype == torch.half


# the layers


@pytest.mark.parametrize(("torchs", "ours"), MODULES)
def test_layers_are_torchs(torchs, ours):
    assert inspect.signature(ours) == inspect.signature(torchs)
    options = [{"inplace": True}, {}] if torchs is not nn.GELU else [{"approximate": "tanh"}, {}]
    for option in options:
        layer = ours(**option)
        assert isinstance(layer, torchs)
        assert repr(layer) == repr(torchs(**option))
        assert not layer.state_dict()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(other) == repr(layer)


@everywhere
@pytest.mark.parametrize(("torchs", "ours"), MODULES)
def test_layers_compute_what_torchs_do(backend, torchs, ours):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected, found = value_and_slope(torchs(), x), value_and_slope(ours(), x)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, check_stride=True)


@everywhere
def test_gelus_third_form(backend):
    x = torch.randn(40, dtype=torch.float64)
    y, slope = value_and_slope(fastnorm.GELU("sigmoid"), x)
    expected = value_and_slope(lambda x: x * torch.sigmoid(1.702 * x), x)
    torch.testing.assert_close((y, slope), expected)


# derivatives


@every_name
def test_gradcheck(backend, name):
    # away from every switch point, where a difference quotient says nothing
    x = torch.tensor([-7.0, -3.5, -1.2, -0.3, 0.4, 1.7, 3.3, 6.6], dtype=torch.float64)
    x.requires_grad_()
    function = lambda x: functional.activation(x, name)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@everywhere
@torch_warns
def test_torch_func(backend):
    x, t = torch.randn(2, 3, 5, dtype=torch.float64)
    for ours, torchs in ((functional.gelu, F.gelu), (functional.selu, F.selu)):
        torch.testing.assert_close(
            torch.func.jvp(ours, (x,), (t,)), torch.func.jvp(torchs, (x,), (t,))
        )
        torch.testing.assert_close(torch.func.vmap(ours)(x), torchs(x))
    beta = torch.rand(5, dtype=torch.float64)
    found = torch.func.jvp(functional.swish, (x, beta), (t, beta))
    s = torch.sigmoid(beta * x)
    expected = t * s + x * s * (1 - s) * (beta * t + x * beta)
    torch.testing.assert_close(found, (x * s, expected))


@torch_warns
@pytest.mark.parametrize("backend", ["auto", "reference"], indirect=True)
def test_compiles(backend):
    layer = nn.Sequential(fastnorm.GELU(), fastnorm.SELU(), fastnorm.Swish(0.5)).double()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (4, 7):
        x = torch.randn(N, 5, dtype=torch.float64, requires_grad=True)
        wanted = (x, *layer.parameters())
        expected, found = (
            torch.autograd.grad(f(x).pow(2).sum(), wanted) for f in (layer, compiled)
        )
        torch.testing.assert_close(found, expected)
