"""Batch norm beside torch.nn's own layers: construction, errors and buffers."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastnorm
from tests.batch_norm_twins import (
    KINDS,
    SHAPES,
    agree,
    every_shape,
    everywhere,
    numpy_warns,
    ours_for,
    outcome,
    results,
    same_state,
    twins,
)

pytestmark = pytest.mark.usefixtures("on_the_device")

# 1, 16: the constructor and what survives a file


@pytest.mark.parametrize("torchs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 1e-3, "momentum": None},
        {"affine": False},
        *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm1d).parameters else []),
        {"track_running_stats": False},
        {"dtype": torch.float64},
        {"device": "meta"},
    ],
    ids=str,
)
def test_constructor_is_torchs(torchs, options):
    theirs, ours = torchs(4, **options), ours_for(torchs)(4, **options)
    assert isinstance(ours, torchs)
    assert inspect.signature(type(ours)) == inspect.signature(torchs)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    described = [
        [(name, t.dtype, t.shape, t.device) for name, t in layer.state_dict().items()]
        for layer in (theirs, ours)
    ]
    assert described[0] == described[1]


def test_state_dict_goes_both_ways():
    theirs, ours = twins()
    assert ours._version == 2
    theirs(torch.randn(3, 5, 2, 2, dtype=torch.float64))
    assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
    same_state(theirs, ours)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


def test_a_file_without_num_batches_tracked_loads():
    _, ours = twins()
    old = {k: v.clone() for k, v in ours.state_dict().items() if k != "num_batches_tracked"}
    fresh = fastnorm.BatchNorm2d(5, dtype=torch.float64)
    fresh.load_state_dict(old)
    assert fresh.num_batches_tracked.item() == 0
    torch.testing.assert_close(fresh.running_var, ours.running_var)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    layer = fastnorm.BatchNormAct2d(5, activation="silu")
    layer(torch.randn(2, 5, 3, 3))
    other = copied(layer).eval()
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(other(x), layer.eval()(x))
    assert other.num_batches_tracked.item() == 1


@everywhere
def test_meta(backend):
    layer = fastnorm.BatchNorm2d(5, device="meta")
    for training in (True, False):
        x = torch.empty(2, 5, 3, 3, device="meta", requires_grad=True)
        y = layer.train(training)(x)
        y.backward(torch.empty_like(y))
        assert y.shape == x.grad.shape == x.shape
        assert y.is_meta
        assert x.grad.is_meta


# 2, 3, 4, 10, 11: what torch refuses, and how much it has done by then

BAD_INPUTS = {
    "2-d": lambda: torch.randn(3, 5),
    "5-d": lambda: torch.randn(1, 5, 2, 2, 2),
    "channels": lambda: torch.randn(2, 4, 3, 3),
    "one-value": lambda: torch.randn(1, 5, 1, 1),
    "no-channels": lambda: torch.randn(2, 0, 3, 3),
    "int": lambda: torch.ones(2, 5, 3, 3, dtype=torch.int64),
    "bool": lambda: torch.ones(2, 5, 3, 3, dtype=torch.bool),
    "complex": lambda: torch.randn(2, 5, 3, 3, dtype=torch.complex64),
}


@everywhere
@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("training", [True, False])
def test_errors_are_torchs(backend, bad, training):
    theirs, ours = (layer.train(training) for layer in twins(dtype=torch.float32))
    x = BAD_INPUTS[bad]()
    assert outcome(lambda: ours(x)) == outcome(lambda: theirs(x))
    same_state(theirs, ours)


@everywhere
@pytest.mark.parametrize(
    ("kind", "shape"), [("1d", (4, 5, 2, 2)), ("1d", (5,)), ("3d", (3, 5, 4, 4))]
)
def test_dimension_errors_are_torchs(backend, kind, shape):
    theirs, ours = twins(KINDS[kind], dtype=torch.float32)
    found = outcome(lambda: ours(torch.randn(shape)))
    assert found == outcome(lambda: theirs(torch.randn(shape)))
    assert found[0] is ValueError


@everywhere
def test_one_value_per_channel(backend):
    layer = fastnorm.BatchNorm1d(5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(1, 5))
    assert layer.num_batches_tracked.item() == 1  # the batch is counted before it is looked at
    assert layer.eval()(torch.randn(1, 5)).shape == (1, 5)
    untracked = fastnorm.BatchNorm1d(5, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        untracked(torch.randn(1, 5))
    agree(*twins(), torch.randn(1, 5, 3, 3, dtype=torch.float64))


@everywhere
@numpy_warns
@pytest.mark.parametrize("eps", [0.0, -1e-5])
@pytest.mark.parametrize("training", [True, False])
def test_eps(backend, eps, training):
    theirs, ours = (layer.train(training) for layer in twins(eps=eps))
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    found, torchs = outcome(lambda: ours(x)), outcome(lambda: theirs(x))
    if training or eps < 0:
        assert found == torchs and found[0] is ValueError
    elif torchs[0] is not ValueError:
        agree(theirs, ours, x)
    elif backend != "auto":  # torch below 2.13 refuses 0 in evaluation too; our kernels do not
        rstd = theirs.running_var.rsqrt()[:, None, None]
        expected = (x - theirs.running_mean[:, None, None]) * rstd
        weight, bias = theirs.weight[:, None, None], theirs.bias[:, None, None]
        torch.testing.assert_close(ours(x), expected * weight + bias)


@everywhere
@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_input(backend, shape, training):
    theirs, ours = (layer.train(training) for layer in twins())
    before = ours.running_mean.clone(), ours.running_var.clone()
    agree(theirs, ours, torch.randn(shape, dtype=torch.float64))
    assert ours.num_batches_tracked.item() == training
    assert torch.equal(ours.running_mean, before[0])
    assert torch.equal(ours.running_var, before[1])
    _, _, dweight, dbias = results(ours, torch.randn(shape, dtype=torch.float64))
    assert not dweight.any()
    assert not dbias.any()


@everywhere
def test_no_channels(backend):
    theirs, ours = nn.BatchNorm2d(0), fastnorm.BatchNorm2d(0)
    x = torch.randn(2, 0, 3, 3)
    assert outcome(lambda: ours(x)) == outcome(lambda: theirs(x))
    assert ours.num_batches_tracked == theirs.num_batches_tracked


# 5, 6, 7, 8: the buffers


@everywhere
@every_shape
@numpy_warns  # momentum 1.5 can make a variance negative
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 1.5, None])
def test_running_statistics(backend, kind, momentum):
    theirs, ours = twins(KINDS[kind], momentum=momentum)
    for _ in range(3):
        agree(theirs, ours, torch.randn(SHAPES[kind], dtype=torch.float64) * 2 + 1)
    assert ours.num_batches_tracked.item() == 3
    agree(theirs.eval(), ours.eval(), torch.randn(SHAPES[kind], dtype=torch.float64))
    assert ours.num_batches_tracked.item() == 3


@everywhere
def test_running_variance_is_unbiased(backend):
    layer = fastnorm.BatchNorm1d(1, momentum=1.0, affine=False)
    y = layer(torch.tensor([[1.0], [3.0]]))
    torch.testing.assert_close(layer.running_var, torch.tensor([2.0]))
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]]))


@everywhere
def test_buffers_keep_their_dtypes(backend):
    layer = fastnorm.BatchNorm2d(5).half()
    layer(torch.randn(3, 5, 4, 4, dtype=torch.half))
    assert layer.num_batches_tracked.dtype == torch.int64
    assert layer.num_batches_tracked.shape == ()
    assert layer.num_batches_tracked.item() == 1
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.half


@everywhere
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_track_running_stats_and_flipped_later(backend, tracks, later, training):
    theirs, ours = (layer.train(training) for layer in twins(track_running_stats=tracks))
    theirs.track_running_stats = ours.track_running_stats = later
    before = copy.deepcopy(ours.state_dict())
    agree(theirs, ours, torch.randn(3, 5, 4, 2, dtype=torch.float64))
    if not (training and later):
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@everywhere
@pytest.mark.parametrize("missing", ["running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_buffer_missing(backend, missing, training, momentum):
    theirs, ours = (layer.train(training) for layer in twins(momentum=momentum))
    setattr(theirs, missing, None)
    setattr(ours, missing, None)
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    assert outcome(lambda: ours(x)) == outcome(lambda: theirs(x))
    same_state(theirs, ours)
