"""What every path of batch norm shares, in plain torch lines: the differentiable wholes, and how
running statistics move."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastnorm.ops.activation.reference import ACTIVATIONS, wide
from fastnorm.ops.registry import differentiable_backward


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


def keeps_output(activation: str) -> bool:
    """Whether backward finds the slope of activation(bn(x) + residual) in y and needs no residual.

    y is the next layer's to keep as well, the residual often nobody's. Only where torch's own layer
    keeps its output: that y must not be changed in place is then nothing new.
    """
    return activation == "relu"


def keep(residual: Tensor, y: Tensor, activation: str) -> Tensor | None:
    """What backward needs of a residual: y, itself, or nothing."""
    if activation == "identity":
        return None
    return y if keeps_output(activation) else residual


def backward_by_formula(
    whole: Callable[..., Tensor],
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    dy: Tensor,
) -> list[Tensor | None]:
    """dx, dresidual, dweight, dbias as differentiable functions, from what keep() has kept;
    ``whole(x, residual, weight, bias, activation=)`` is the layer in torch's functions."""
    dz = None
    if kept is not None and keeps_output(activation):
        dz = dy = ACTIVATIONS[activation].gradient(dy, kept)
        kept, activation = None, "identity"
    composite = functools.partial(whole, activation=activation)
    found = list(differentiable_backward(composite, (x, kept, weight, bias), dy))
    found[1] = found[1] if dz is None else dz
    return found


def slope_times(
    dy: Tensor,
    v: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> Tensor:
    """dz, the wide gradient of the pre-activation, which is recomputed from the wide input v unless
    y is kept."""
    if activation == "identity":
        return wide(dy)
    if kept is not None and keeps_output(activation):
        return ACTIVATIONS[activation].gradient(wide(dy), wide(kept))
    z = composite(v, kept, weight, bias, mean, rstd, 0.0, "identity")
    return ACTIVATIONS[activation].gradient(wide(dy), z)
