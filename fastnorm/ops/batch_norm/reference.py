"""Batch norm on ATen's own kernels: the oracle everywhere, the implementation where there is no
GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import dispatch, layout
from fastnorm.ops.activation.reference import wide
from fastnorm.ops.batch_norm.composite import channelwise as channelwise
from fastnorm.ops.batch_norm.composite import composite as composite
from fastnorm.ops.batch_norm.composite import factor, move, slope_times
from fastnorm.ops.batch_norm.composite import finish as finish
from fastnorm.ops.batch_norm.composite import mean_only_composite as mean_only_composite
from fastnorm.ops.batch_norm.composite import traced as traced
from fastnorm.ops.batch_norm.reference_sync import batch_norm_apply as batch_norm_apply
from fastnorm.ops.batch_norm.reference_sync import batch_norm_merge as batch_norm_merge
from fastnorm.ops.batch_norm.reference_sync import batch_norm_reduce as batch_norm_reduce
from fastnorm.ops.batch_norm.reference_sync import batch_norm_statistics as batch_norm_statistics

aten = torch.ops.aten


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ATen's training forward, without its running statistics, whatever mixture of dtypes the
    parameters are."""
    types = {p.dtype for p in (weight, bias) if p is not None}
    # ATen rounds the statistics to the parameters' type, or the input's: they must stay wide
    if (types or {x.dtype}) == {wide(x).dtype}:
        y, mean, rstd = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    else:
        parameters = [None if p is None else p.to(wide(x).dtype) for p in (weight, bias)]
        y, mean, rstd = aten.native_batch_norm(wide(x), *parameters, None, None, True, 0.0, eps)
        y = y.to(x.dtype)
    return y, mean, rstd


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    batch_stats: bool,
    momentum: float | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    dtype = wide(x).dtype
    if batch_stats:
        y, mean, rstd = _normalise(x, weight, bias, eps)
        mean, rstd = mean.to(dtype), rstd.to(dtype)
        share = factor(momentum, num_batches_tracked)
        if running_var is not None:
            move(running_var, wide(x).var([0, *range(2, x.dim())], correction=1), share)
        move(running_mean, mean, share)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, rstd = running_mean.to(dtype), torch.rsqrt(running_var.to(dtype) + eps)
        y = composite(x, None, weight, bias, mean, rstd, eps, "identity")
    y = finish(y, residual, activation)
    return layout.match(y, layout.planes_like(x)), torch.stack([mean, rstd])


def batch_norm_backward(
    x: Tensor,
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    batch_stats: bool,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    v = wide(x)
    mean, rstd = statistics
    dz = slope_times(dy, v, kept, weight, bias, mean, rstd, activation)
    scale = None if weight is None else weight.to(v.dtype)
    if batch_stats:
        dx, dweight, dbias = aten.native_batch_norm_backward(
            dz, v, scale, None, None, mean, rstd, True, 0.0, [needs[0], needs[1], needs[2]]
        )
    else:
        dims = [0, *range(2, x.dim())]
        dx = dz * channelwise(rstd if scale is None else rstd * scale, x) if needs[0] else None
        x_hat = (v - channelwise(mean, x)) * channelwise(rstd, x)
        dweight = (dz * x_hat).sum(dims) if needs[1] else None
        dbias = dz.sum(dims) if needs[2] else None
    return (
        layout.match(dx.to(x.dtype), layout.planes_like(x))
        if dx is not None and needs[0]
        else None,
        dweight.to(weight.dtype)
        if dweight is not None and weight is not None and needs[1]
        else None,
        dbias.to(bias.dtype) if dbias is not None and bias is not None and needs[2] else None,
        layout.match(dz.to(x.dtype, copy=True), layout.planes_like(x)) if needs[3] else None,
    )


def mean_only_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> Tensor:
    """The batch's mean, towards which the running mean has moved."""
    mean = wide(x).mean([0, *range(2, x.dim())])
    move(running_mean, mean, factor(momentum, num_batches_tracked))
    return mean


def mean_only_batch_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    num_batches_tracked: Tensor | None,
    batch_stats: bool,
    momentum: float | None,
) -> Tensor:
    mean = running_mean
    if batch_stats:
        mean = mean_only_statistics(x, running_mean, num_batches_tracked, momentum)
    return layout.match(mean_only_composite(x, bias, mean), layout.planes_like(x))


def mean_only_batch_norm_backward(
    dy: Tensor, bias: Tensor | None, batch_stats: bool, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    v = wide(dy)
    dims = [0, *range(2, dy.dim())]
    dx = v - v.mean(dims, keepdim=True) if batch_stats else v.clone()
    return (
        layout.match(dx.to(dy.dtype), layout.planes_like(dy)) if needs[0] else None,
        v.sum(dims).to(bias.dtype) if needs[1] and bias is not None else None,
    )


def native(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """What an unfused model calls, in place where such models write so: nobody else has the output
    of batch norm, and its backward does without."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if dispatch.transformed() or torch.compiler.is_compiling():
        return finish(y, residual, activation)
    if residual is not None and residual.shape == y.shape and residual.dtype == y.dtype:
        y, residual = y.add_(residual), None
    if residual is None and activation == "relu":
        return y.relu_()
    return finish(y, residual, activation)
