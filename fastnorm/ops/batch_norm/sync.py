"""Batch norm over the batches of all processes: one all_gather forward, one all_reduce backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastnorm import dispatch, layout
from fastnorm.ops.activation import check_name
from fastnorm.ops.activation.reference import wide, wide_dtype
from fastnorm.ops.batch_norm import (
    Gradients,
    _backward,
    _forward,
    backward_outputs,
    batch_norm,
    check_parameters,
    check_residual,
    collectives,
)
from fastnorm.ops.batch_norm.composite import (
    backward_by_formula,
    channelwise,
    composite,
    finish,
    keep,
)
from fastnorm.ops.registry import register

# the outputs, and what an op of synchronisation looks like to torch


def statistics_outputs(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.size(1) + 1, dtype=wide_dtype(x))


def merge_outputs(gathered: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = gathered.new_empty(gathered.size(1) // 2)
    return mean, torch.empty_like(mean), gathered.new_empty(())


def reduce_outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(x.size(1), dtype=wide_dtype(x))
    return sums, torch.empty_like(sums)


def apply_outputs(x: Tensor, *rest: Any) -> Gradients:
    needs_dresidual = rest[-1]
    return layout.planes_like(x), layout.planes_like(x) if needs_dresidual else None


# x [N, C, ...] -> statistics [2 * C + 1], wide: mean, sum of squared deviations from it, count
_statistics = register(
    "batch_norm", "batch_norm_statistics", "(Tensor x) -> Tensor", statistics_outputs
)
# gathered [ranks, 2 * C + 1] -> mean [C], biased variance [C], count []; all of gathered's dtype.
# Moves the running statistics (not from fewer than two values) and counts the batch.
_merge = register(
    "batch_norm",
    "batch_norm_merge",
    "(Tensor gathered, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float? momentum) -> (Tensor, Tensor, Tensor)",
    merge_outputs,
)
# -> sum dz [C], sum dz * x_hat [C], wide: this process's gradients of bias and weight
_reduce = register(
    "batch_norm",
    "batch_norm_reduce",
    "(Tensor x, Tensor dy, Tensor? kept, Tensor? weight, Tensor? bias, "
    "Tensor statistics, str activation) -> (Tensor, Tensor)",
    reduce_outputs,
)
# sums [2 * C]: both sums over all processes; count []: values per channel there -> dx, dresidual
_apply = register(
    "batch_norm",
    "batch_norm_apply",
    "(Tensor x, Tensor dy, Tensor? kept, Tensor? weight, Tensor? bias, "
    "Tensor statistics, Tensor sums, Tensor count, str activation, bool needs_dresidual) "
    "-> (Tensor, Tensor?)",
    apply_outputs,
)


def _composite(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    count: Tensor, eps: float, activation: str, group: str,
) -> Tensor:  # fmt: skip
    """The differentiable whole from plain torch lines."""
    v, dims = wide(x), [0, *range(2, x.dim())]
    mean = collectives.AllReduce.apply(v.sum(dims), group) / count  # type: ignore[no-untyped-call]
    squares = (v - channelwise(mean, x)).square().sum(dims)
    var = collectives.AllReduce.apply(squares, group) / count  # type: ignore[no-untyped-call]
    rstd = torch.rsqrt(var + eps)
    return composite(x, residual, weight, bias, mean, rstd, eps, activation)


class SyncBatchNormFunction(torch.autograd.Function):
    """Saves what BatchNormFunction saves, and the number of values per channel in all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        activation: str,
        ranks: int,
        group: str,
    ) -> Tensor:
        empty = x.numel() == 0  # such a process still has to take part in the collectives
        local = statistics_outputs(x).zero_() if empty else _statistics(x)
        gathered = collectives.communicate("all_gather_into_tensor", local, ranks, group)
        mean, var, count = _merge(
            gathered.view(ranks, -1), running_mean, running_var, num_batches_tracked, momentum
        )
        if empty:
            y, statistics = layout.planes_like(x), torch.stack([mean, var])
        else:
            y, statistics = _forward(
                x, residual, weight, bias, mean, var, None, False, None, eps, activation
            )
        kept = None if residual is None else keep(residual, y, activation)
        ctx.save_for_backward(x, kept, weight, bias, statistics, count)
        ctx.settings = eps, activation, group
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, kept, weight, bias, statistics, count = ctx.saved_tensors
        eps, activation, group = ctx.settings
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
        plain = activation == "identity"
        if torch.is_grad_enabled():
            whole = functools.partial(_composite, count=count, eps=eps, group=group)
            found = tuple(backward_by_formula(whole, x, kept, weight, bias, activation, dy))
        else:
            needs = [needs_dx, needs_dweight, needs_dbias, needs_dresidual and not plain]
            dy_in_place = layout.match(dy, layout.planes_like(x))
            given = x, dy_in_place, kept, weight, bias, statistics
            dx, dweight, dbias, dresidual = _gradients(given, count, activation, group, needs)
            found = dx, dresidual, dweight, dbias
        dx, dresidual, dweight, dbias = found
        return dx, dy if plain and needs_dresidual else dresidual, dweight, dbias, *[None] * 8


def _gradients(
    given: tuple[Any, Any, Any, Any, Any, Any],
    count: Tensor,
    activation: str,
    group: str,
    needs: list[bool],
) -> Gradients:
    """dx, dweight, dbias, dresidual, each where it is needed; only dx asks other processes."""
    x, _, _, weight, bias, statistics = given
    needs_dx, needs_dweight, needs_dbias, needs_dresidual = needs
    if x.numel() == 0:
        if needs_dx:
            collectives.communicate("all_reduce", statistics.new_zeros(2 * x.size(1)), "sum", group)
        outputs = backward_outputs(*given, False, activation, needs)
        return tuple(None if t is None else t.zero_() for t in outputs)
    if not needs_dx:
        none: Gradients = (None,) * 4
        return _backward(*given, False, activation, needs) if any(needs) else none
    sum_dz, sum_dz_x_hat = _reduce(*given, activation)
    sums = collectives.communicate("all_reduce", torch.cat([sum_dz, sum_dz_x_hat]), "sum", group)
    dx, dresidual = _apply(*given, sums, count, activation, needs_dresidual)
    return (
        dx,
        sum_dz_x_hat.to(weight.dtype) if needs_dweight else None,
        sum_dz.to(bias.dtype) if needs_dbias else None,
        dresidual,
    )


def _check(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, eps: float, **more: Any
) -> None:
    """What torch's batch norm refuses is refused before any process waits for another."""
    if x.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")
    if x.size(1) == 0:
        raise ValueError("SyncBatchNorm number of input channels should be non-zero")
    if not x.is_floating_point():
        raise NotImplementedError(f'"sync_batch_norm" not implemented for {x.dtype}')
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    check_parameters(x, running_mean=running_mean, running_var=running_var, **more)
    compiling = torch.compiler.is_compiling() and not dispatch.exporting()
    if dispatch.transformed() and not compiling:
        raise RuntimeError(
            "synchronised batch norm does not work under torch.func, forward-mode AD, "
            "torch.jit.trace or torch.export, which do not carry its collectives: call eval() "
            "first, or use batch_norm"
        )


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    *,
    num_batches_tracked: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalisation with the statistics of the batches of all processes, for training.

    .. math::
        y = f\\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}}
        \\cdot w + b + r\\right)

    with E and Var per channel over every value that the processes of the group hold, weighted by
    how many each holds; a process may hold none. One all_gather of (mean, sum of squared
    deviations, count) per call, one all_reduce in backward where ``input`` needs a gradient. The
    gradients of weight and bias are this process's share: summing them is the business of DDP or
    FSDP. Without an initialised process group, with one process in it, and on a process outside it,
    this is :func:`batch_norm` with ``training=True``.

    Args:
        input: ``[N, C, ...]``, floating point, any strides; every process of the group calls with
            the same C and dtype, and its own N (0 included) and sizes.
        running_mean: ``[C]`` or None; moves towards the mean of all, the same on every process.
        running_var: ``[C]`` or None; moves towards the unbiased variance of all.
        weight: w, ``[C]``; None means 1. Any floating dtype.
        bias: b, ``[C]``; None means 0. Any floating dtype.
        momentum: share of the batch in the running statistics; None for the cumulative average, 1 /
            batches so far.
        eps: added to the variance; positive.
        process_group: whose processes share statistics; None for all of them.
        num_batches_tracked: int64, 0-d; incremented.
        activation: f by name, see :func:`activation`; None for none.
        residual: r, added before the activation, as in :func:`batch_norm`.

    Returns:
        Input's shape and dtype; channels_last if ``input`` is, else contiguous.

    Raises:
        ValueError: fewer than two dimensions, no channels, eps not positive, an unknown activation,
            one of the two running statistics without the other.
        TypeError: ``process_group`` is not one.
        RuntimeError: a parameter of another size or device; a residual that cannot be added; a
            group that cannot carry tensors of this device, or that was destroyed; use under
            torch.func, forward-mode AD, torch.jit.trace or torch.export.
        NotImplementedError: ``input`` is not floating point.

    Source: Ioffe & Szegedy, Batch Normalization, 2015, https://arxiv.org/abs/1502.03167; the
    statistics are merged as in Chan, Golub & LeVeque, 1979.

    Example:
        >>> import torch, fastnorm
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # one process: batch norm
        >>> fastnorm.functional.sync_batch_norm(x, None, None, activation="relu")
        tensor([[0.0000, 0.0000],
                [1.0000, 1.0000]])
    """
    if not torch.compiler.is_compiling():
        collectives.check_group(process_group)
    members = collectives.members(process_group)
    if members is None:
        return batch_norm(
            input, running_mean, running_var, weight, bias, True, momentum, eps,
            num_batches_tracked=num_batches_tracked, activation=activation, residual=residual,
        )  # fmt: skip
    name = check_name(activation)
    inside = residual is None or check_residual(input, residual)
    _check(input, running_mean, running_var, eps, weight=weight, bias=bias)
    y: Tensor = SyncBatchNormFunction.apply(  # type: ignore[no-untyped-call]
        layout.to_planes(input),
        layout.match(residual, layout.planes_like(input))
        if inside and residual is not None
        else None,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        name if inside else "identity",
        *members,
    )
    return y if inside else finish(y, residual, name)
