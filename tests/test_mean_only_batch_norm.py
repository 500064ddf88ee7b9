"""Mean-only batch norm, its rules one by one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastnorm
from fastnorm import functional
from tests.batch_norm_twins import (
    MEAN_ONLY,
    SHAPES,
    agree,
    every_shape,
    everywhere,
    results,
    torch_warns,
)

pytestmark = pytest.mark.usefixtures("on_the_device")

# mean-only batch norm


class MeanOnly(nn.Module):
    """Salimans & Kingma's section 3 from plain torch lines."""

    def __init__(self, C, momentum):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(C, dtype=torch.float64))
        self.momentum = momentum
        self.register_buffer("running_mean", torch.randn(C, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean = self.running_mean
        if self.training:
            mean = x.mean([0, *range(2, x.dim())])
            self.num_batches_tracked += 1
            count = self.num_batches_tracked.item()
            share = 1 / count if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), share)
        return x - mean.view(shape) + self.bias.view(shape)


def mean_only_twins(kind="2d", momentum=0.1):
    theirs = MeanOnly(5, momentum)
    ours = MEAN_ONLY[kind](5, momentum=momentum, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@everywhere
@every_shape
@pytest.mark.parametrize("momentum", [0.1, 1.5, None])
def test_mean_only(backend, kind, momentum):
    theirs, ours = mean_only_twins(kind, momentum)
    for _ in range(2):
        agree(theirs, ours, torch.randn(SHAPES[kind], dtype=torch.float64) + 2)
    agree(theirs.eval(), ours.eval(), torch.randn(SHAPES[kind], dtype=torch.float64))


def test_mean_only_layer():
    layer = fastnorm.MeanOnlyBatchNorm2d(5)
    assert list(layer.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)  # whose fusers read running_var
    assert (
        repr(layer) == "MeanOnlyBatchNorm2d(5, momentum=0.1, bias=True, track_running_stats=True)"
    )
    bare = fastnorm.MeanOnlyBatchNorm1d(5, bias=False, track_running_stats=False)
    assert not bare.state_dict()
    assert bare.eval()(torch.randn(4, 5) + 3).mean().abs() < 1e-6
    layer(torch.randn(2, 5, 3, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.running_mean, layer.running_mean)
    layer.reset_parameters()
    assert layer.num_batches_tracked.item() == 0
    assert not layer.running_mean.any()
    half = fastnorm.MeanOnlyBatchNorm2d(5, device="meta").half()
    assert half.num_batches_tracked.dtype == torch.int64
    assert half(torch.empty(2, 5, 3, 3, device="meta").half()).dtype == torch.half


@everywhere
def test_mean_only_errors(backend):
    layer = fastnorm.MeanOnlyBatchNorm2d(5)
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"expected 2D or 3D input \(got 4D input\)"):
        fastnorm.MeanOnlyBatchNorm1d(5)(torch.randn(3, 5, 1, 1))
    assert layer.num_batches_tracked.item() == 0
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 5"):
        layer(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 5, 1, 1))
    assert layer.num_batches_tracked.item() == 2  # as torch's batch norm counts them
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(NotImplementedError, match="not implemented for"):
            layer(torch.ones(2, 5, 3, 3).to(dtype))
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.empty(2, 5, 3, 3, device="meta"))
    with pytest.raises(ValueError, match="expected running_mean in evaluation mode"):
        functional.mean_only_batch_norm(torch.randn(3, 5), None)
    torch.testing.assert_close(layer.eval()(torch.ones(1, 5, 1, 1)), torch.ones(1, 5, 1, 1))


@everywhere
@pytest.mark.parametrize("training", [True, False])
def test_mean_only_empty(backend, training):
    _, ours = mean_only_twins()
    ours.train(training)
    before = ours.running_mean.clone()
    y, dx, dbias = results(ours, torch.randn(0, 5, 3, 3, dtype=torch.float64))
    assert y.shape == dx.shape == (0, 5, 3, 3)
    assert torch.equal(dbias, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(ours.running_mean, before)
    assert ours.num_batches_tracked.item() == training


@everywhere
@pytest.mark.parametrize("training", [True, False])
def test_mean_only_derivatives(backend, training):
    mean = None if training else torch.randn(2, dtype=torch.float64)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(x, bias):
        return functional.mean_only_batch_norm(x, mean, bias, training)

    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


@everywhere
@torch_warns
def test_mean_only_forward_mode_and_vmap(backend):
    x, t = torch.randn(2, 3, 5, 4, 2, dtype=torch.float64)
    layer = fastnorm.MeanOnlyBatchNorm2d(5, track_running_stats=False, dtype=torch.float64)
    _, tangent = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(tangent, t - t.mean((0, 2, 3), keepdim=True))
    found = torch.func.vmap(layer)(torch.stack([x, t]))
    torch.testing.assert_close(found, torch.stack([layer(x), layer(t)]))


@pytest.mark.parametrize("training", [True, False])
def test_mean_only_saves_nothing_of_the_input(backend, training):
    _, ours = mean_only_twins()
    saved = []
    leaf = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ours.train(training)(leaf * 1)
    assert all(t.numel() <= 5 for t in saved)
    y.sum().backward()


@everywhere
def test_mean_only_layouts(backend):
    _, ours = mean_only_twins()
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    expected = results(ours, x)
    for given in (x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :5]):
        found = results(ours, given)
        for e, f in zip(expected, found, strict=True):
            torch.testing.assert_close(f, e)
        last = given.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.contiguous_format
        assert found[0].is_contiguous(memory_format=form)
