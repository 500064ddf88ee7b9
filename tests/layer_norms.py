"""What the tests of layer norm share: inputs, a call with its gradients, and the comparison with
torch's own."""

from __future__ import annotations

import pytest
import torch

from fastnorm import dispatch
from fastnorm.ops.layer_norm import layer_norm
from tests.conftest import DEVICE

HALF = (torch.float16, torch.bfloat16)
NUMPY_WARNS = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # of inf and 0 / 0, in which the interpreter computes


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(DEVICE, dtype)


def nhwc(n, c, h, w):
    return randn(n, c, h, w).permute(0, 2, 3, 1)


def results(backend, x, shape, parameters, residual=None, dy=None, cast=None, **options):
    """[y, (sum), dx, (dresidual), (dweight), (dbias)], computed in `cast` where it is given."""

    def leaf(t):
        return None if t is None else (t.detach().to(cast) if cast else t.detach()).requires_grad_()

    x, residual, weight, bias = (leaf(t) for t in (x, residual, *parameters))
    with dispatch.backend(backend):
        outputs = layer_norm(x, shape, weight, bias, residual=residual, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        dy = randn(*x.shape, seed=3) if dy is None else dy
        gradients = [g.to(outputs[0].dtype) for g in (dy, randn(*x.shape, seed=4))]
        wanted = [t for t in (x, residual, weight, bias) if t is not None]
        return [*outputs, *torch.autograd.grad(outputs, wanted, gradients[: len(outputs)])]


def agrees(backend, x, shape, *, affine=True, residual=None, parameter_dtype=None, **options):
    """Error against fp64 at most twice torch's own."""
    kind = parameter_dtype or x.dtype
    parameters = [randn(*shape, dtype=kind, seed=s) if affine else None for s in (1, 2)]
    truth = results("auto", x, shape, parameters, residual, cast=torch.float64, **options)
    torchs = results("auto", x, shape, parameters, residual, **options)
    ours = results(backend, x, shape, parameters, residual, **options)
    floor = (
        2e-15 if x.dtype == torch.float64 else 2e-7
    )  # one rounding of the result, where torch happens to have none
    for own, theirs, true in zip(ours, torchs, truth, strict=True):
        assert own.shape == theirs.shape
        assert own.is_contiguous()
        scale = true.norm().clamp_min(1e-30)
        error, allowed = ((t.double() - true).norm() / scale for t in (own, theirs))
        assert error <= 2 * allowed + floor
        assert own.dtype == theirs.dtype
