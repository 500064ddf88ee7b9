"""Layer norm at the edges: errors, parameters that are left out, the module, empty and degenerate
rows, mixed dtypes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastnorm import dispatch
from fastnorm.modules.layer_norm import LayerNorm
from fastnorm.ops import layer_norm as family
from fastnorm.ops.layer_norm import layer_norm, output_dtype
from tests.conftest import AVAILABLE as BACKENDS
from tests.layer_norms import HALF, NUMPY_WARNS, agrees, randn, results

# errors, parameters, the module


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    "arguments",
    [
        (randn(2, 4), []),
        (randn(2, 4), [5]),
        (randn(2, 4), [1, 2, 4]),
        (randn(2, 4), [4], randn(3)),
        (randn(2, 4), [4], None, randn(2, 2)),
        (torch.tensor(1.0), [1]),
        (torch.ones(2, 4, dtype=torch.int64), [4]),
    ],
)
def test_errors_are_torchs(backend, arguments):
    with pytest.raises((RuntimeError, NotImplementedError)) as theirs:
        F.layer_norm(*arguments)
    with dispatch.backend(backend), pytest.raises(type(theirs.value)) as ours:
        layer_norm(*arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend):
    x = randn(2, 4)
    with dispatch.backend(backend):
        with pytest.raises(
            ValueError, match="unknown activation 'swash': choose one of identity, relu"
        ):
            layer_norm(x, (4,), activation="swash")
        with pytest.raises(ValueError, match="unknown autocast 'output'"):
            layer_norm(x, (4,), autocast="output")
        with pytest.raises(RuntimeError, match="same device"):
            layer_norm(x, (4,), torch.ones(4, device="meta"))
        with pytest.raises(RuntimeError, match="must match"):
            layer_norm(x, (4,), residual=randn(2, 3))
    with pytest.raises(ValueError, match="unknown activation"):
        LayerNorm(4, activation="swash")
    with pytest.raises(ValueError, match="unknown autocast"):
        LayerNorm(4, autocast="output")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "bias"), [(randn(5), None), (None, randn(5)), (None, None)])
def test_one_parameter_or_none(backend, weight, bias):
    with dispatch.backend(backend):
        torch.testing.assert_close(
            layer_norm(randn(3, 5), (5,), weight, bias),
            F.layer_norm(randn(3, 5), (5,), weight, bias),
        )


@pytest.mark.parametrize(
    ("arguments", "options"), [((4,), {}), (([2, 3],), {"eps": 1e-3}), ((4,), {"bias": False})]
)
def test_module_is_torchs(arguments, options):
    ours, theirs = LayerNorm(*arguments, **options), torch.nn.LayerNorm(*arguments, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    fused = LayerNorm(*arguments, **options, activation="gelu", autocast="input")
    assert "activation='gelu', autocast='input'" in repr(fused)
    x = randn(3, *ours.normalized_shape)
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(clone(x), F.gelu(theirs(x)))
    y, total = fused(x, x, return_sum=True)
    torch.testing.assert_close((y, total), (F.gelu(theirs(2 * x)), 2 * x))


# empty and degenerate rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5)])
def test_empty(backend, shape):
    x = torch.empty(shape, requires_grad=True)
    parameters = [torch.ones(shape[-1:], requires_grad=True) for _ in range(2)]
    with dispatch.backend(backend):
        y = layer_norm(x, shape[-1:], *parameters)
        gradients = torch.autograd.grad(y.sum(), [x, *parameters])
    assert y.shape == x.shape
    assert [g.shape for g in gradients] == [t.shape for t in (x, *parameters)]
    assert not any(g.any() for g in gradients)


@NUMPY_WARNS
@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_rows(backend):
    with dispatch.backend(backend):
        bias = torch.tensor([3.0])
        assert torch.equal(layer_norm(randn(4, 1), (1,), torch.ones(1), bias), bias.expand(4, 1))
        assert layer_norm(torch.ones(2, 4), (4,), eps=0.0).isnan().all()
        assert torch.equal(layer_norm(torch.full((2, 33), 1e4), (33,)), torch.zeros(2, 33))
        torch.testing.assert_close(
            layer_norm(randn(2, 4), (4,), eps=0.0), F.layer_norm(randn(2, 4), (4,), eps=0.0)
        )
        rows = randn(3, 40)
        rows[1, 7], rows[2, 3] = float("inf"), float("nan")
        y = layer_norm(rows, (40,))
        assert y[0].isfinite().all()
        assert y[1:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_and_outlier(backend):
    agrees(backend, randn(4, 100) + 1e4, (100,))
    x = randn(4, 100)
    x[:, 0] = 1e4
    agrees(backend, x, (100,))


# dtypes


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_mixed_dtypes(backend):
    for kind, parameter in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, weight, bias = (
            randn(6, 33, dtype=kind),
            randn(33, dtype=parameter),
            randn(33, dtype=parameter, seed=1),
        )
        y, *gradients = results(backend, x, (33,), (weight, bias))
        assert [t.dtype for t in (y, *gradients)] == [kind, kind, parameter, parameter]
        true = F.layer_norm(x.double(), (33,), weight.double(), bias.double())
        assert (y.double() - true).norm() <= (2e-7 if kind == torch.float32 else 1e-2) * true.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_statistics_are_wide(backend, dtype):
    with dispatch.backend(backend):
        _, statistics, total = torch.ops.fastnorm.layer_norm_forward(
            randn(2, 3, 8, dtype=dtype), None, None, None, 1, 1e-5, "identity", dtype, False
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (statistics.dtype, tuple(statistics.shape)) == (wide, (2, 6))
    assert total is None


class OnCuda:
    """What output_dtype asks of a tensor, of one on a GPU."""

    is_cuda = True

    def __init__(self, dtype):
        self.dtype = dtype


def test_autocast_gives_fp32_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    for dtype in HALF:
        assert output_dtype(OnCuda(dtype), None) == torch.float32
        assert output_dtype(OnCuda(dtype), "input") == dtype
    assert output_dtype(OnCuda(torch.float64), None) == torch.float64
    assert output_dtype(randn(1, dtype=torch.bfloat16), None) == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_output_of_half_input(backend, monkeypatch):
    """What CUDA autocast asks of the kernels: bf16 read, fp32 written, and a bf16 gradient of an
    fp32 one."""
    monkeypatch.setattr(family, "output_dtype", lambda input, autocast: torch.float32)
    x, weight = randn(4, 40, dtype=torch.bfloat16).requires_grad_(), randn(40).requires_grad_()
    with dispatch.backend(backend):
        y = layer_norm(x, (40,), weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), randn(4, 40, seed=3), retain_graph=True)
        (again,) = torch.autograd.grad(y, x, randn(4, 40, seed=3), create_graph=True)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, F.layer_norm(x.float(), (40,), weight))
    torch.testing.assert_close(dx, again, rtol=2e-2, atol=1e-2)
