"""Batch norm on ATen's own kernels: the oracle everywhere, the implementation where there is no
GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import layout
from fastnorm.ops.activation.reference import ACTIVATIONS, wide

aten = torch.ops.aten


def channelwise(v: Tensor, x: Tensor) -> Tensor:
    """v of [C], shaped to broadcast over x of [N, C, ...]."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def finish(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(z + residual), as the unfused model writes it."""
    if residual is not None:
        z = z + residual
    return z if activation == "identity" else ACTIVATIONS[activation].value(z)


def composite(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The differentiable whole from plain torch lines; statistics of the batch where none are
    given."""
    v = wide(x)
    if mean is None or rstd is None:
        dims = [0, *range(2, x.dim())]
        mean = v.mean(dims)
        rstd = torch.rsqrt((v - channelwise(mean, x)).square().mean(dims) + eps)
    v = (v - channelwise(mean, x)) * channelwise(rstd, x)
    if weight is not None:
        v = v * channelwise(weight, x)
    if bias is not None:
        v = v + channelwise(bias, x)
    if residual is not None:
        v = v + residual
    return (v if activation == "identity" else ACTIVATIONS[activation].value(v)).to(x.dtype)


def traced(
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
) -> Tensor:
    """What F.batch_norm cannot say in a graph (momentum=None, statistics of another dtype), in
    torch functions that a graph can hold."""
    v, dims = wide(x), [0, *range(2, x.dim())]
    if not batch_stats:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(v.dtype), running_var.to(v.dtype)
    else:
        mean = v.mean(dims)
        var = (v - channelwise(mean, x)).square().mean(dims)
        with torch.no_grad():
            share, count = factor(momentum, num_batches_tracked), x.numel() // x.size(1)
            move(running_mean, mean, share)
            move(running_var, var * (count / (count - 1)), share)
    return composite(x, residual, weight, bias, mean, torch.rsqrt(var + eps), eps, activation)


def mean_only_composite(x: Tensor, bias: Tensor | None, mean: Tensor | None) -> Tensor:
    v = wide(x)
    v = v - channelwise(v.mean([0, *range(2, x.dim())]) if mean is None else mean, x)
    return (v if bias is None else v + channelwise(bias, x)).to(x.dtype)


def factor(momentum: float | None, num_batches_tracked: Tensor | None) -> Tensor | float:
    """The share of the new batch in a running statistic, without a host sync; counts the batch."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            return num_batches_tracked.double().reciprocal()
    return 0.0 if momentum is None else momentum


def move(running: Tensor | None, value: Tensor, share: Tensor | float) -> None:
    if running is None:
        return
    old = wide(running)
    new = old * (1 - share) + value.to(old.dtype) * share
    if torch.compiler.is_compiling():
        running.copy_(new)
    else:  # .data: as in torch's kernels, this is no change that autograd counts
        running.data.copy_(new)


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
) -> tuple[Tensor, Tensor, Tensor]:
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
        mean, rstd = running_mean.to(dtype, copy=True), torch.rsqrt(running_var.to(dtype) + eps)
        y = composite(x, None, weight, bias, mean, rstd, eps, "identity")
    y = finish(y, residual, activation)
    return layout.match(y, layout.planes_like(x)), mean, rstd


def slope_times(
    dy: Tensor,
    v: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> Tensor:
    """dz, the wide gradient of the pre-activation, which is recomputed from the wide input v."""
    if activation == "identity":
        return wide(dy)
    z = composite(v, residual, weight, bias, mean, rstd, 0.0, "identity")
    return ACTIVATIONS[activation].gradient(wide(dy), z)


def batch_norm_backward(
    x: Tensor,
    dy: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    batch_stats: bool,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    v = wide(x)
    dz = slope_times(dy, v, residual, weight, bias, mean, rstd, activation)
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
    """What an unfused model calls."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return finish(y, residual, activation)
