"""Batch norm beside torch.nn's own layers: construction, buffers, errors, layouts, derivatives."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.optim import swa_utils

import fastnorm
from fastnorm import functional
from fastnorm.ops.activation import NAMES, reference
from tests.conftest import AVAILABLE, HAS_TRITON

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


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


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
    dy = torch.randn(x.shape, dtype=x.dtype) if dy is None else dy
    for expected, found in zip(results(theirs, x, dy), results(ours, x, dy), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, check_stride=strides)
    same_state(theirs, ours)


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


# 1, 16: the constructor and what survives a file


@pytest.mark.parametrize("torchs", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 1e-3, "momentum": None},
        {"affine": False},
        {"bias": False},
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
    found = outcome(lambda: ours(x))
    assert found == outcome(lambda: theirs(x))
    if training or eps < 0:
        assert found[0] is ValueError
    else:
        agree(theirs, ours, x)


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
    y, mean, rstd = torch.ops.fastnorm.batch_norm_forward(*arguments)
    assert y.dtype == torch.half
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)))


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
    agree(theirs, ours, x)
    if training:
        assert ours.running_var[2].isnan()
        expected = torch.full((), value, dtype=torch.float64)
        torch.testing.assert_close(ours.running_mean[2], expected, equal_nan=True)
        assert ours.running_mean.isfinite().sum() == 4


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


# torch.compile


@torch_warns
@pytest.mark.parametrize("backend", ["auto", "reference"], indirect=True)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_once_for_every_batch_size(backend, momentum, training):
    layer = fastnorm.BatchNormAct2d(5, momentum=momentum, activation="silu", dtype=torch.float64)
    eager = copy.deepcopy(layer).train(training)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer.train(training), fullgraph=True, backend=counting, dynamic=True)
    counts = set()
    for N in (3, 4, 7):
        x, r = torch.randn(2, N, 5, 4, 2, dtype=torch.float64)
        for e, f in zip(
            results(eager, x, residual=r), results_of(compiled, layer, x, r), strict=True
        ):
            torch.testing.assert_close(f, e)
        same_state(eager, layer)
        counts.add(len(graphs))
    assert len(counts) == 1, "another batch size compiled again"


def results_of(compiled, layer, x, r):
    x = x.detach().requires_grad_()
    y = compiled(x, residual=r)
    return [y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))]


@torch_warns
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_mean_only_compiles(backend):
    layer = fastnorm.MeanOnlyBatchNorm2d(5, momentum=None, dtype=torch.float64)
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(compiled(x), eager(x))
    (dx,) = torch.autograd.grad(compiled(x).pow(2).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(eager(x).pow(2).sum(), x)[0])
    same_state(eager, layer)


# the two forms of the Triton kernels, on tensors of many tiles

FORMS = {"ticket": 0, "owner": 1 << 20}
MANY_TILES = {
    "nchw": lambda: torch.randn(4, 3, 4, 4) * 3 + 1,
    "nhwc": lambda: torch.randn(2, 40, 2, 2).to(memory_format=torch.channels_last),
    "nlc": lambda: torch.randn(2, 12, 6).transpose(1, 2),
    "nc": lambda: torch.randn(11, 12),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> Iterator[str]:
    """Tiles so small that a hundred numbers are many; the plan's cache has both limits as keys."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    from fastnorm.ops.batch_norm import plan

    monkeypatch.setattr(plan, "TILE_BYTES", 512)
    monkeypatch.setattr(plan, "OWNER_TILES", FORMS[request.param])
    with fastnorm.backend("triton"):
        yield request.param


def idle() -> bool:
    """Whether every launch so far has left its counters zero."""
    from fastnorm.ops import launch

    return bool(launch._arenas) and not any(arena.any() for arena in launch._arenas.values())


def whole(x, dy, residual, activation):
    """One training step through function and backward, with everything that it changes."""
    C = x.size(1)
    weight, bias = torch.linspace(0.5, 2, C).to(x.dtype), torch.linspace(-1, 1, C).to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    mean, var = torch.zeros(C, dtype=x.dtype), torch.ones(C, dtype=x.dtype)
    count = torch.tensor(1)
    y = functional.batch_norm(
        leaves[0], mean, var, *leaves[2:], True, None,
        num_batches_tracked=count, activation=activation, residual=leaves[1],
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var, count]


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("layout", MANY_TILES)
def test_both_forms_of_the_kernels(form, layout, activation):
    from fastnorm.ops.batch_norm.plan import plan

    x = MANY_TILES[layout]()
    residual, dy = torch.randn(2, *x.shape)
    cut = plan(x, x.contiguous() if layout == "nlc" else x, operands=2)
    assert cut.tiles > 2
    assert cut.owner == (form == "owner")
    found = whole(x, dy, residual, activation)
    assert idle()
    with fastnorm.backend("reference"):
        exact = whole(x.double(), dy.double(), residual.double(), activation)
    for e, f in zip(exact, found, strict=True):
        torch.testing.assert_close(f.double(), e.double(), rtol=2e-5, atol=2e-5)
    again = whole(x, dy, residual, activation)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "not deterministic"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_both_forms_of_mean_only(form, layout):
    x = MANY_TILES[layout]()
    layer = fastnorm.MeanOnlyBatchNorm2d(x.size(1))
    dy = torch.randn(x.shape)
    y, dx, dbias = results(layer, x, dy)
    assert idle()
    torch.testing.assert_close(y, x - x.mean((0, 2, 3), keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dy - dy.mean((0, 2, 3), keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias, dy.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_both_forms_in_evaluation(form):
    theirs, ours = (layer.eval() for layer in twins(C=3))
    agree(theirs, ours, MANY_TILES["nchw"]().double())
    assert idle()


@numpy_warns
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 3])
def test_both_forms_with_a_value_that_is_not_finite(form, value, at):
    theirs, ours = twins(C=3)
    x = MANY_TILES["nchw"]().double()
    x[at, 2, 3, 3] = value
    agree(theirs, ours, x)
    assert idle()


def test_both_forms_keep_digits_at_a_large_mean(form):
    x = MANY_TILES["nchw"]() + 1e4
    y = functional.batch_norm(x, None, None, training=True)
    exact = F.batch_norm(x.double(), None, None, training=True)
    # half an ulp of fp32 at 1e4 is 4.9e-4, in the mean of a tile and in that of all; std is 3
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2 * 4.9e-4 / 3)
