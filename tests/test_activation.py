"""Activations: values and slopes against fp64, switch points, limits, layouts, in place, Swish.

What hard piecewise functions have for the *gradient* at NaN is in no table here: torch's own scalar
and vector CPU kernels disagree about it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.compare import assert_as_good_as_torch
from tests.conftest import AVAILABLE, HAS_TRITON

# "auto" is torch's own function on a CPU: what we add around it is tested there too
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE], indirect=True)
numpy_warns = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of the interpreter's infinities
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and Dynamo
every_name = pytest.mark.parametrize("name", NAMES)

INF, NAN = math.inf, math.nan
SIZES = (31, 32, 33, 49, 4097)  # around a vector, and more than one block of every dtype
TORCHS = {
    "identity": lambda z: z * 1,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu_sigmoid": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
MODULES = [(nn.GELU, fastnorm.GELU), (nn.SiLU, fastnorm.SiLU), (nn.SELU, fastnorm.SELU)]


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


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

LAYOUTS = {
    "0-d": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 6).t(),
    "sliced": lambda: torch.randn(4, 9)[:, 2:7],
    "expanded": lambda: torch.randn(1, 5).expand(4, 5),
}


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


# in place

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


# Swish

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
