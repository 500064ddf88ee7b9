"""Batch norm with a residual and an activation, and what else reads a batch norm layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

import fastnorm
from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.batch_norm_twins import (
    KINDS,
    SHAPES,
    everywhere,
    outcome,
    results,
    same_state,
    twins,
)

pytestmark = pytest.mark.usefixtures("on_the_device")

# what else reads a batch norm layer


def test_convert_sync_batchnorm():
    model = nn.Sequential(fastnorm.BatchNorm2d(5), nn.ReLU())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert converted[0].weight is model[0].weight
    assert converted[0].running_mean is model[0].running_mean


@everywhere
def test_update_bn(backend):
    batches = [torch.randn(6, 5, dtype=torch.float64) + i for i in range(3)]
    theirs, ours = (nn.Sequential(layer) for layer in twins(nn.BatchNorm1d))
    for model in (theirs, ours):
        swa_utils.update_bn(batches, model)
    same_state(theirs, ours)
    torch.testing.assert_close(ours[0].running_mean, torch.stack(batches).mean((0, 1)))
    assert ours[0].momentum == 0.1


# residual and activation


def test_act_layers_describe_themselves():
    layer = fastnorm.BatchNormAct2d(4, eps=1e-3, activation="silu")
    assert repr(layer).startswith("BatchNormAct2d(4, eps=0.001,")
    assert repr(layer).endswith("activation='silu')")
    assert isinstance(layer, nn.BatchNorm2d)
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    with pytest.raises(ValueError, match="unknown activation 'swoosh': choose one of identity,"):
        fastnorm.BatchNormAct1d(4, activation="swoosh")
    with pytest.raises(ValueError, match="unknown activation"):
        functional.batch_norm(torch.randn(3, 4), None, None, training=True, activation="swoosh")


@everywhere
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "activation"),
    # one shape covers the names, one name the shapes
    [
        *(("2d", name) for name in (None, *NAMES)),
        *((kind, "silu") for kind in SHAPES if kind != "2d"),
    ],
)
def test_residual_and_activation(backend, kind, training, activation):
    plain, _ = twins(KINDS[kind])
    act = getattr(fastnorm, KINDS[kind].__name__.replace("Norm", "NormAct"))
    layer = act(5, activation=activation, dtype=torch.float64)
    layer.load_state_dict(plain.state_dict())
    plain.train(training)
    layer.train(training)
    x, r, dy = torch.randn(3, *SHAPES[kind], dtype=torch.float64)
    r1, r2 = r.clone().requires_grad_(), r.clone().requires_grad_()

    class Composed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = plain

        def forward(self, x, residual):
            return reference.ACTIVATIONS[activation or "identity"].value(self.norm(x) + residual)

    expected = results(Composed(), x, dy, residual=r1)
    found = results(layer, x, dy, residual=r2)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)
    expected = torch.autograd.grad(Composed()(x, r1), r1, dy)
    torch.testing.assert_close(torch.autograd.grad(layer(x, r2), r2, dy), expected)
    same_state(plain, layer)


@everywhere
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, 5, 1, 1, dtype=torch.float64),  # broadcast
        lambda: torch.randn((), dtype=torch.float64),
        lambda: torch.randn(2, 3, 5, 4, 2, dtype=torch.float64),  # the sum is larger than x
        lambda: torch.randn(3, 5, 4, 2),  # another dtype
        lambda: torch.randn(3, 8, 4, 5, dtype=torch.float64).permute(0, 3, 2, 1)[..., ::4],
    ],
    ids=["broadcast", "0-d", "larger", "dtype", "strided"],
)
def test_a_residual_that_torch_can_add(backend, activation, make):
    layer = fastnorm.BatchNormAct2d(5, activation=activation, dtype=torch.float64)
    plain = nn.BatchNorm2d(5, dtype=torch.float64)
    x, r = torch.randn(3, 5, 4, 2, dtype=torch.float64), make()
    leaves = [r.detach().clone().requires_grad_() for _ in range(2)]
    expected = plain(x) + leaves[0]
    expected = expected if activation is None else expected.relu()
    found = layer(x, leaves[1])
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves[1], dy), torch.autograd.grad(expected, leaves[0], dy)
    )
    same_state(plain, layer)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x, r), plain(x) + r if activation is None else (plain(x) + r).relu()
        )


@everywhere
def test_a_wider_residual_promotes(backend):
    layer = fastnorm.BatchNormAct2d(5, activation="relu")
    x = torch.randn(3, 5, 4, 2).half()
    r = torch.randn(3, 5, 4, 2)
    y = layer(x, r)
    assert y.dtype == torch.float32
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, True) + r
    torch.testing.assert_close(y, expected.relu(), rtol=1e-3, atol=1e-3)


@everywhere
@pytest.mark.parametrize("residual", [(3, 4, 4, 2), (3, 5, 4, 3), (2,)])
def test_a_residual_that_cannot_be_added(backend, residual):
    layer = fastnorm.BatchNormAct2d(5)
    before = copy.deepcopy(layer.state_dict())
    x, r = torch.randn(3, 5, 4, 3 if residual == (2,) else 2), torch.randn(residual)
    found = outcome(lambda: layer(x, r))
    assert found == outcome(lambda: x + r)
    assert found[0] is RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@everywhere
def test_a_residual_on_another_device(backend):
    layer = fastnorm.BatchNormAct2d(5)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.randn(3, 5, 4, 2), torch.empty(3, 5, 4, 2, device="meta"))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
