"""Batch norm beside torch.nn's own layers: dtypes, layouts, parameters, derivatives, infinities."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastnorm
from fastnorm import functional
from tests.batch_norm_twins import (
    agree,
    agree_with_the_cpu,
    everywhere,
    numpy_warns,
    outcome,
    results,
    same_state,
    torch_warns,
    twins,
)
from tests.conftest import DEVICE

pytestmark = pytest.mark.usefixtures("on_the_device")

# 9: when the buffers move, and what a backward reads


@everywhere
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_move_without_grad(backend, mode):
    theirs, ours = twins()
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    with mode():
        torch.testing.assert_close(ours(x), theirs(x))
    same_state(theirs, ours)
    assert ours.num_batches_tracked.item() == 1
    agree(theirs, ours, x)  # and the buffers are ordinary tensors still


@everywhere
def test_versions_of_the_running_statistics_stay(backend):
    theirs, ours = twins()
    before = [layer.running_mean._version for layer in (theirs, ours)]
    before += [layer.running_var._version for layer in (theirs, ours)]
    for layer in (theirs, ours):
        layer(torch.randn(3, 5, 4, 2, dtype=torch.float64))
    after = [layer.running_mean._version for layer in (theirs, ours)]
    after += [layer.running_var._version for layer in (theirs, ours)]
    assert after == before


def test_training_step_between_eval_forward_and_its_backward(backend):
    """torch reads the running statistics again in backward; ours has kept those of the forward."""
    _, ours = twins()
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    expected = results(ours.eval(), x, dy)
    y = ours(x)
    ours.train()(torch.randn(3, 5, 4, 2, dtype=torch.float64) + 3)
    found = torch.autograd.grad(y, (x, ours.weight, ours.bias), dy)
    for e, f in zip(expected[1:], found, strict=True):
        torch.testing.assert_close(f, e)


# 11: dtypes


@everywhere
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_half_input_with_fp32_parameters(backend, dtype, training):
    theirs, ours = (layer.train(training) for layer in twins(dtype=torch.float32))
    x = torch.randn(3, 5, 4, 2).to(dtype)
    agree(theirs, ours, x, dy=torch.ones_like(x))
    assert ours(x).dtype == dtype
    assert ours.running_mean.dtype == torch.float32


def test_saved_statistics_are_fp32(backend):
    x = torch.randn(3, 5, 4, 2).half()
    arguments = (x, None, None, None, None, None, None, True, 0.1, 1e-5, "identity")
    y, statistics = torch.ops.fastnorm.batch_norm_forward(*arguments)
    assert y.dtype == torch.half
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics[0], x.float().mean((0, 2, 3)))


@everywhere
@pytest.mark.parametrize("training", [True, False])
def test_bf16_parameters_with_fp32_running_statistics(backend, training):
    """torch refuses; FSDP2's mixed precision casts parameters and leaves buffers."""
    layer = fastnorm.BatchNorm2d(5).train(training)
    layer.weight.data = layer.weight.data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    wide = nn.BatchNorm2d(5).train(training)
    x = torch.randn(3, 5, 4, 2).bfloat16()
    found, expected = results(layer, x), results(wide, x.float())
    torch.testing.assert_close(found[0], expected[0].bfloat16())
    assert [t.dtype for t in found] == [torch.bfloat16] * 4
    torch.testing.assert_close(layer.running_var, wide.running_var)
    assert layer.running_var.dtype == torch.float32


@everywhere
def test_autocast_leaves_batch_norm_alone(backend, device):
    theirs, ours = twins(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, 4, 2).to(dtype)
        with torch.autocast(device, dtype=torch.bfloat16):
            expected, found = theirs(x), ours(x)
        assert found.dtype == expected.dtype == dtype
        torch.testing.assert_close(found, expected)


# 12: layouts

CHANNELS_LAST = {
    "2d": (nn.BatchNorm2d, (3, 8, 4, 2), torch.channels_last),
    "3d": (nn.BatchNorm3d, (2, 8, 2, 3, 2), torch.channels_last_3d),
}


@everywhere
@pytest.mark.parametrize("kind", CHANNELS_LAST)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dy_too", [True, False])
def test_channels_last_stays(backend, kind, training, dy_too):
    torchs, shape, form = CHANNELS_LAST[kind]
    theirs, ours = (layer.train(training) for layer in twins(torchs, C=8))
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=form)
    dy = torch.randn(shape, dtype=torch.float64)
    dy = dy.to(memory_format=form) if dy_too else dy
    agree(theirs, ours, x, dy)
    y, dx, *_ = results(ours, x, dy)
    assert y.is_contiguous(memory_format=form)
    if backend != "auto":  # torch's own eval backward follows dy
        assert dx.is_contiguous(memory_format=form)


STRIDED = {
    "sliced-channels": lambda: torch.randn(3, 9, 4, 4, dtype=torch.float64)[:, 2:7],
    "sliced-rows": lambda: torch.randn(3, 5, 8, 2, dtype=torch.float64)[:, :, ::2],
    "expanded": lambda: torch.randn(1, 5, 4, 2, dtype=torch.float64).expand(3, 5, 4, 2),
    "expanded-channel": lambda: torch.randn(3, 1, 4, 2, dtype=torch.float64).expand(3, 5, 4, 2),
    "transposed": lambda: torch.randn(3, 5, 2, 4, dtype=torch.float64).transpose(2, 3),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("training", [True, False])
def test_other_strides_give_contiguous_outputs(backend, name, training):
    theirs, ours = (layer.train(training) for layer in twins())
    x = STRIDED[name]()
    agree(theirs, ours, x)
    y, dx, *_ = results(ours, x)
    assert y.is_contiguous()
    assert dx.is_contiguous()


def test_nlc_gives_contiguous_outputs(backend):
    theirs, ours = twins(nn.BatchNorm1d)
    x = torch.randn(3, 6, 5, dtype=torch.float64).transpose(1, 2)
    agree(theirs, ours, x)
    assert all(t.is_contiguous() for t in results(ours, x))


# 13: parameters

PARAMETERS = ["both", "weight-frozen", "bias-frozen", "frozen", "no-weight", "no-bias", "none"]


@everywhere
@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_and_absent_parameters(backend, case, training):
    theirs, ours = (layer.train(training) for layer in twins())
    for layer in (theirs, ours):
        if case in ("weight-frozen", "frozen"):
            layer.weight.requires_grad_(False)
        if case in ("bias-frozen", "frozen"):
            layer.bias.requires_grad_(False)
        if case in ("no-weight", "none"):
            layer.weight = None
        if case in ("no-bias", "none"):
            layer.bias = None
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    agree(theirs, ours, x)
    if case == "both":  # it may also be the input that needs no gradient
        for layer in (theirs, ours):
            layer.zero_grad()
            layer(x).pow(3).sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@everywhere
def test_eval_gradients(backend):
    _, ours = twins()
    x, dy = torch.randn(2, 3, 5, 4, 2, dtype=torch.float64)
    _, dx, dweight, dbias = results(ours.eval(), x, dy)
    rstd = torch.rsqrt(ours.running_var + ours.eps).view(-1, 1, 1)
    torch.testing.assert_close(dx, dy * ours.weight.view(-1, 1, 1) * rstd)
    x_hat = (x - ours.running_mean.view(-1, 1, 1)) * rstd
    torch.testing.assert_close(dweight, (dy * x_hat).sum((0, 2, 3)))
    torch.testing.assert_close(dbias, dy.sum((0, 2, 3)))


# 14: derivatives


@everywhere
@pytest.mark.parametrize("training", [True, False])
def test_input_changed_before_backward(backend, training):
    _, ours = twins()
    leaf = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    x = leaf * 1
    y = ours.train(training)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@everywhere
@pytest.mark.parametrize("training", [True, False])
def test_output_may_be_changed(backend, training):
    theirs, ours = (layer.train(training) for layer in twins())
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    agree(then_relu_in_place(theirs), then_relu_in_place(ours), x)


def then_relu_in_place(layer):
    return nn.Sequential(layer, nn.ReLU(inplace=True))


DIFFERENTIATED = [
    (True, "identity", False),
    (True, "silu", True),
    (False, "identity", True),
    (False, "gelu", False),
]


@pytest.mark.parametrize(("training", "activation", "residual"), DIFFERENTIATED)
def test_gradcheck(backend, training, activation, residual):
    x, r = (torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5
    inputs = (x, w, b, r) if residual else (x, w, b)

    def function(x, w, b, r=None):
        statistics = (None, None) if training else (mean, var)
        options = {"activation": activation, "residual": r}
        return functional.batch_norm(x, *statistics, w, b, training, **options)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_double_backward_of_a_strided_input(backend):
    wide = torch.randn(2, 2, 4, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        return functional.batch_norm(x[:, :, ::2], None, None, training=True, activation="silu")

    assert torch.autograd.gradgradcheck(function, (wide,))


@everywhere
@torch_warns
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode(backend, training):
    theirs, ours = (layer.train(training) for layer in twins(track_running_stats=not training))
    x, t = torch.randn(2, 3, 5, 4, 2, dtype=torch.float64)
    expected = torch.func.jvp(theirs, (x,), (t,))
    for e, f in zip(expected, torch.func.jvp(ours, (x,), (t,)), strict=True):
        torch.testing.assert_close(f, e)
    with forward_ad.dual_level():
        y = ours(forward_ad.make_dual(x, t))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected[1])


@everywhere
@torch_warns
def test_vmap_of_an_untracked_layer(backend):
    _, ours = twins(track_running_stats=False)
    batches = torch.randn(3, 4, 5, 2, 2, dtype=torch.float64)
    found = torch.func.vmap(ours)(batches)
    torch.testing.assert_close(found, torch.stack([ours(x) for x in batches]))


@everywhere
@torch_warns
def test_vmap_of_a_tracked_layer_is_refused(backend):
    theirs, ours = twins()
    batches = torch.randn(3, 4, 5, 2, 2, dtype=torch.float64)
    found = outcome(lambda: torch.func.vmap(ours)(batches))
    assert found[0] is outcome(lambda: torch.func.vmap(theirs)(batches))[0] is RuntimeError


# 15: values that are not finite


@everywhere
@numpy_warns
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("training", [True, False])
def test_not_finite(backend, value, training):
    theirs, ours = (layer.train(training) for layer in twins())
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    x[1, 2, 3, 1] = value
    # on a GPU `auto` and the reference are torch's kernels for it
    as_on_a_cpu = DEVICE == "cpu" or backend in ("triton", "cuda")
    (agree_with_the_cpu if as_on_a_cpu else agree)(theirs, ours, x)
    if training:
        assert ours.running_var[2].isnan()
        assert ours.running_mean.isfinite().sum() == 4
    if training and as_on_a_cpu:
        expected = torch.full((), value, dtype=torch.float64)
        torch.testing.assert_close(ours.running_mean[2], expected, equal_nan=True)
