"""What a review found: calls that gave wrong numbers, each with the number that torch gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastnorm
from fastnorm import dispatch
from fastnorm.functional import batch_norm, layer_norm, mean_only_batch_norm, swish, weight_norm
from fastnorm.ops.batch_norm.plan import plan

interpreted = pytest.mark.skipif(
    not dispatch.interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1"
)
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastnorm.backend(request.param):
        yield request.param


DEPENDENT = {
    "residual x was made from": lambda a: batch_norm(
        a * a, None, None, training=True, activation="silu", residual=a
    ),
    "x as its own residual": lambda a: batch_norm(
        a, None, None, training=True, activation="silu", residual=a
    ),
    "weight made from x": lambda a: batch_norm(a, None, None, a[0, :, 0], training=True),
    "layer norm": lambda a: layer_norm(a, (5,), a[0, 0], a[1, 1]),
    "swish": lambda a: swish(a, a[0, :, 0]),
    "weight norm": lambda a: weight_norm(a, a.norm(dim=(1, 2), keepdim=True) ** 2),
}


@pytest.mark.parametrize("case", DEPENDENT)
def test_differentiable_gradients_of_inputs_that_depend_on_each_other(backend, case):
    a = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(a)
    (plain,) = torch.autograd.grad(DEPENDENT[case](a), a, dy)
    (differentiable,) = torch.autograd.grad(DEPENDENT[case](a), a, dy, create_graph=True)
    torch.testing.assert_close(differentiable, plain)


def _one_channel(kind):
    if kind == "NLC":
        return torch.randn(4, 8, 3).transpose(1, 2)[:, 1:2]
    return torch.randn(4, 5, 5, 3).permute(0, 3, 1, 2)[:, 1:2]


@pytest.mark.parametrize("kind", ["NLC", "NHWC"])
def test_one_channel_cut_out_of_channels_last(backend, kind):
    x = _one_channel(kind).detach().requires_grad_()
    dy = torch.randn(x.shape)
    y = batch_norm(x, None, None, training=True)
    expected = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_parameters_with_gaps(backend, training):
    x = torch.randn(4, 6, 5, requires_grad=True)
    dy, weight, bias = torch.randn(4, 6, 5), torch.rand(12)[::2], torch.rand(1).expand(6)
    weight.requires_grad_()
    buffers = torch.rand(2, 12)
    results = []
    for function in (batch_norm, F.batch_norm):
        mean, var = buffers.clone()[:, ::2]
        y = function(x, mean, var, weight, bias, training)
        results.append((y, *torch.autograd.grad(y, (x, weight), dy), mean, var))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mean_only_batch_norm_of_parameters_with_gaps(backend, training):
    x, bias, mean = torch.randn(4, 6, 5), torch.rand(12)[::2], torch.rand(12)[::2]
    batch = x.mean((0, 2))
    centre = batch if training else mean.clone()
    moved = 0.9 * mean + 0.1 * batch if training else mean.clone()
    y = mean_only_batch_norm(x, mean, bias, training)
    torch.testing.assert_close(y, x - centre[:, None] + bias[:, None])
    torch.testing.assert_close(mean, moved)


@pytest.mark.parametrize("gap", ["sliced", "expanded"])
def test_swish_of_a_beta_with_gaps(backend, gap):
    beta = torch.rand(12)[::2] if gap == "sliced" else torch.rand(1).expand(6)
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(swish(x, beta), x * torch.sigmoid(beta[:, None] * x))


def test_swish_keeps_the_digits_of_a_number_for_fp64(backend):
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(swish(x, 0.1), x * torch.sigmoid(0.1 * x), rtol=1e-14, atol=1e-15)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the inf - inf that is meant
@pytest.mark.parametrize("batch", [4, 100, 200, 400])
def test_running_mean_of_an_infinite_batch_is_infinite(backend, batch):
    x = torch.randn(batch, 1, 64)
    x[0] = float("inf")
    mean, var = torch.zeros(1), torch.ones(1)
    batch_norm(x, mean, var, training=True)
    assert mean.item() == float("inf")
    assert var.isnan().item()


@interpreted
@pytest.mark.triton
def test_strides_of_two_to_the_31_elements_and_more():
    storage = torch.empty(2**31 + 64, dtype=torch.half)  # pages never touched cost nothing
    x = storage.as_strided((2, 4, 8), (2**31, 8, 1))
    x.copy_(torch.randn(2, 4, 8))
    with fastnorm.backend("triton"):
        y = batch_norm(x, None, None, training=True)
    expected = F.batch_norm(x.float(), None, None, training=True)
    torch.testing.assert_close(y.float(), expected, atol=2e-3, rtol=2e-3)


@interpreted
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 5)])
def test_no_compile_key_depends_on_the_batch_size(shape):
    keys = [
        plan(x, torch.empty_like(x), operands=1).constants
        for x in (torch.empty(n, *shape) for n in (1, 2, 3, 100))
    ]
    assert all(key == keys[0] for key in keys)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_layer_norm_refuses_what_torch_refuses(dtype):
    weight = torch.ones(3)
    with pytest.raises(RuntimeError):
        layer_norm(torch.ones(2, 3, dtype=dtype), (3,), weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and Dynamo
def test_an_inplace_activation_compiles():
    module = fastnorm.SiLU(inplace=True)
    x = torch.randn(3, 5, requires_grad=True)
    with fastnorm.backend("reference"):
        y = torch.compile(lambda x: module(x * 1.0), fullgraph=True, backend="aot_eager")(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, F.silu(x))
    torch.testing.assert_close(dx, torch.autograd.grad(F.silu(x).sum(), x)[0])


def test_mean_only_gradient_keeps_channels_last_under_an_expanded_gradient(backend):
    x = torch.randn(2, 8, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    mean_only_batch_norm(x, None, None, True).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_identity_refuses_integers_as_every_activation_does(backend):
    with pytest.raises(NotImplementedError, match="identity"):
        fastnorm.functional.activation(torch.arange(3), "identity")


def test_bf16_parameters_beside_an_fp64_input_get_their_gradients(backend):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    dy = torch.rand_like(x)
    weight, bias = (torch.ones(3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    batch_norm(x, None, None, weight, bias, training=True).backward(dy)
    x_hat = F.batch_norm(x, None, None, training=True)
    for p, exact in ((weight, (dy * x_hat).sum((0, 2))), (bias, dy.sum((0, 2)))):
        torch.testing.assert_close(p.grad, exact.to(torch.bfloat16))
