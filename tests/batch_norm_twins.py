"""What the tests of batch norm share: layers in pairs, torch's and ours, and their comparison."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastnorm
from tests.conftest import AVAILABLE

# "auto" is torch's own function on a CPU: what our layers add around it is tested there too
everywhere = pytest.mark.parametrize("backend", ["auto", *AVAILABLE], indirect=True)
numpy_warns = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's inf - inf
torch_warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and Dynamo

SHAPES = {
    "1d": (6, 5),
    "1d-length": (4, 5, 6),
    "2d": (3, 5, 4, 2),
    "3d": (2, 5, 2, 3, 2),
}
KINDS = {
    "1d": nn.BatchNorm1d,
    "1d-length": nn.BatchNorm1d,
    "2d": nn.BatchNorm2d,
    "3d": nn.BatchNorm3d,
}
MEAN_ONLY = {
    "1d": fastnorm.MeanOnlyBatchNorm1d,
    "1d-length": fastnorm.MeanOnlyBatchNorm1d,
    "2d": fastnorm.MeanOnlyBatchNorm2d,
    "3d": fastnorm.MeanOnlyBatchNorm3d,
}
every_shape = pytest.mark.parametrize("kind", SHAPES)


def ours_for(torchs):
    return getattr(fastnorm, torchs.__name__)


def twins(torchs=nn.BatchNorm2d, C=5, dtype=torch.float64, **options):
    """torch's layer and ours with the same parameters and buffers, none of them trivial."""
    theirs = torchs(C, dtype=dtype, **options)
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if name == "running_var" or name == "weight":
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.normal_()
    ours = ours_for(torchs)(C, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def results(layer, x, dy=None, **more):
    """[y, dx, gradients of the parameters], raw: not copied by autograd's accumulation."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = layer(x, **more)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y) if dy is None else dy)]


def agree(theirs, ours, x, dy=None, strides=False):
    dy = torch.randn(x.shape, dtype=x.dtype, device=x.device) if dy is None else dy
    for expected, found in zip(results(theirs, x, dy), results(ours, x, dy), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, check_stride=strides)
    same_state(theirs, ours)


def agree_with_the_cpu(theirs, ours, x):
    """As `agree`, with torch's layer on a CPU: of a value that is not finite its kernels for a GPU
    (Welford's update, inf - inf) make a NaN, where a mean is infinite."""
    dy = torch.randn(x.shape, dtype=x.dtype, device=x.device)
    theirs = theirs.cpu()
    for expected, found in zip(
        results(theirs, x.cpu(), dy.cpu()), results(ours, x, dy), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, equal_nan=True, check_stride=False)
    same_state(theirs, copy.deepcopy(ours).cpu())


def same_state(theirs, ours):
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)


def outcome(call):
    """The error's type and text, or the shape and dtype of the result."""
    try:
        y = call()
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    return y.shape, y.dtype
