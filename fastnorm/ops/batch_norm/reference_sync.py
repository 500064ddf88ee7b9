"""Synchronised batch norm on ATen: what comes before and after its two collectives."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnorm import layout
from fastnorm.ops.activation.reference import wide
from fastnorm.ops.batch_norm.composite import channelwise, factor, move, slope_times


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def batch_norm_statistics(x: Tensor) -> Tensor:
    v = wide(x)
    mean = v.mean(_dims(x))  # not var_mean, which makes NaN of an infinite mean
    m2 = (v - channelwise(mean, x)).square().sum(_dims(x))
    return torch.cat([mean, m2, mean.new_full((1,), x.numel() // x.size(1))])


def batch_norm_merge(
    gathered: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    C = gathered.size(1) // 2
    means, m2, counts = gathered.split([C, C, 1], dim=1)
    count = counts.sum()
    divisor = count.clamp(min=1)
    # distances from one rank's mean keep their digits; an infinite mean must stay infinite
    pivot = torch.where(means[0].isfinite(), means[0], 0.0)
    mean = pivot + (counts * (means - pivot)).sum(0) / divisor
    var = (m2 + counts * (means - mean).square()).sum(0) / divisor
    # fewer than two values have no unbiased variance: the running ones stay
    share = (count > 1).to(count.dtype) * factor(momentum, num_batches_tracked)
    move(running_mean, mean, share)
    move(running_var, var * (count / (count - 1).clamp(min=1)), share)
    return mean, var, count


def batch_norm_reduce(
    x: Tensor,
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    v = wide(x)
    mean, rstd = statistics
    dz = slope_times(dy, v, kept, weight, bias, mean, rstd, activation)
    x_hat = (v - channelwise(mean, x)) * channelwise(rstd, x)
    return dz.sum(_dims(x)), (dz * x_hat).sum(_dims(x))


def batch_norm_apply(
    x: Tensor,
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    count: Tensor,
    activation: str,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor | None]:
    v = wide(x)
    mean, rstd = statistics
    dz = slope_times(dy, v, kept, weight, bias, mean, rstd, activation)
    x_hat = (v - channelwise(mean, x)) * channelwise(rstd, x)
    mean_dz, mean_dz_x_hat = (channelwise(t, x) for t in (sums / count).chunk(2))
    scale = rstd if weight is None else rstd * weight
    dx = (dz - mean_dz - x_hat * mean_dz_x_hat) * channelwise(scale, x)
    like = layout.planes_like(x)
    return (
        layout.match(dx.to(x.dtype), like),
        layout.match(dz.to(x.dtype, copy=True), like) if needs_dresidual else None,
    )
