"""Batch norm, residual and activation in the same pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastnorm import dispatch, layout
from fastnorm.ops.activation import check_name
from fastnorm.ops.activation.reference import wide_dtype
from fastnorm.ops.batch_norm import reference
from fastnorm.ops.batch_norm.composite import backward_by_formula, keep
from fastnorm.ops.registry import applied, by_formula, register

Gradients = tuple[Tensor | None, ...]


# the outputs, and what an op of this family looks like to torch; statistics [2, C], wide, are the
# mean and 1 / sqrt(variance + eps) of every channel


def forward_outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    C = x.shape[1]  # empty and new_empty take twice as long
    statistics = torch.empty_strided((2, C), (C, 1), dtype=wide_dtype(x), device=x.device)
    return layout.planes_like(x), statistics


def backward_outputs(
    x: Tensor,
    dy: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    batch_stats: bool,
    activation: str,
    needs: list[bool],
) -> Gradients:
    return (
        layout.planes_like(x) if needs[0] else None,
        torch.empty_like(weight) if weight is not None and needs[1] else None,
        torch.empty_like(bias) if bias is not None and needs[2] else None,
        layout.planes_like(x) if needs[3] else None,
    )


_forward = register(
    "batch_norm",
    "batch_norm_forward",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, bool batch_stats, float? momentum, float eps, str activation)"
    " -> (Tensor, Tensor)",
    forward_outputs,
)
# kept: what composite.keep has kept of a residual
_backward = register(
    "batch_norm",
    "batch_norm_backward",
    "(Tensor x, Tensor dy, Tensor? kept, Tensor? weight, Tensor? bias, "
    "Tensor statistics, bool batch_stats, str activation, bool[4] needs)"
    " -> (Tensor?, Tensor?, Tensor?, Tensor?)",
    backward_outputs,
)


class BatchNormFunction(torch.autograd.Function):
    """Saves x, the parameters and the statistics; the residual, or y in its place, only where an
    activation's slope needs it."""

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
        settings: tuple[bool, float | None, float, str],
        way: str,
    ) -> Tensor:
        batch_stats, momentum, eps, activation = settings
        y, statistics = _forward.by[way](
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            batch_stats,
            momentum,
            eps,
            activation,
        )
        kept = None if residual is None else keep(residual, y, activation)
        ctx.save_for_backward(x, kept, weight, bias, statistics)
        ctx.set_materialize_grads(False)  # what torch gives no gradient gets none from us
        ctx.settings = settings
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        if dy is None:
            return (None,) * 9
        x, kept, weight, bias, statistics = ctx.saved_tensors
        batch_stats, _, eps, activation = ctx.settings
        plain = activation == "identity"
        if by_formula(dy):
            mean, rstd = (None, None) if batch_stats else statistics
            whole = functools.partial(reference.composite, mean=mean, rstd=rstd, eps=eps)
            found = backward_by_formula(whole, x, kept, weight, bias, activation, dy)
        else:
            needs_dx, needs_dresidual, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
            needs = [needs_dx, needs_dweight, needs_dbias, needs_dresidual and not plain]
            found = [None] * 4
            if any(needs):
                dy_in_place = layout.match(dy, layout.planes_like(x))
                dx, dweight, dbias, dresidual = _backward(
                    x,
                    dy_in_place,
                    kept,
                    weight,
                    bias,
                    statistics,
                    batch_stats,
                    activation,
                    needs,
                )
                found = [dx, dresidual, dweight, dbias]
        if plain and ctx.needs_input_grad[1]:
            found[1] = dy
        return *found, *[None] * 5


_apply = applied(BatchNormFunction)


def served(
    x: Tensor,
    batch_stats: bool,
    parameters: tuple[Tensor | None, ...],
) -> bool:
    """Whether our ops take this call. What they do not take goes to torch: its result for an empty
    batch, its error."""
    shape, count, dtype = x.shape, x.numel(), x.dtype
    if len(shape) < 2 or count == 0 or not dtype.is_floating_point:
        return False
    if batch_stats and count == shape[1]:
        return False
    per_channel, device = (shape[1],), x.device
    for p in parameters:
        if p is not None and not (
            p.shape == per_channel
            and p.device == device
            and (p.dtype is dtype or p.is_floating_point())
        ):
            return False
    return True


def countable(count: Tensor, x: Tensor) -> bool:
    """Whether a kernel on x's device can count a batch."""
    return count.dtype is torch.int64 and count.device == x.device


def counted(count: Tensor, momentum: float | None) -> float:
    """Count a batch as torch's layers do, before it is looked at; the share of the batch in the
    running statistics."""
    count.add_(1)
    return 1.0 / float(count) if momentum is None else momentum


def check_parameters(x: Tensor, **parameters: Tensor | None) -> None:
    """RuntimeError where a parameter or buffer does not have one value per channel, on x's
    device."""
    for what, value in parameters.items():
        if value is not None and value.numel() != x.size(1):
            raise RuntimeError(f"{what} should contain {x.size(1)} elements not {value.numel()}")
        if value is not None and value.device != x.device:
            raise RuntimeError(
                f"{what} is on {value.device}, input on {x.device}: expected the same device"
            )
        if value is not None and not value.is_floating_point():
            raise NotImplementedError(f"{what} is {value.dtype}: give a floating-point tensor")


def check_residual(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the residual can be added inside the kernel; torch's own error where it cannot be
    added at all."""
    if residual is None:
        return True
    if residual.shape != x.shape:  # broadcast, or torch's error before anything is changed
        try:
            torch.broadcast_shapes(x.shape, residual.shape)
        except RuntimeError:
            x + residual
            raise
    if residual.device != x.device and residual.dim() > 0:
        raise RuntimeError(
            "expected all tensors to be on the same device: "
            f"input is on {x.device}, residual on {residual.device}"
        )
    return residual.shape == x.shape and residual.dtype == x.dtype


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalisation, then an optional residual and activation, in one pass.

    .. math::
        y = f\\left(\\frac{x - \\mathrm{E}[x]}{\\sqrt{\\mathrm{Var}[x] + \\epsilon}}
        \\cdot w + b + r\\right)

    with E and Var per channel: of the batch when ``training`` (biased variance; the running ones
    move by ``momentum`` towards mean and unbiased variance), else the running ones.

    Args:
        input: ``[N, C]``, ``[N, C, L]``, ``[N, C, H, W]`` or ``[N, C, D, H, W]``, floating point,
            any strides.
        running_mean: ``[C]`` or None; updated in place when ``training``.
        running_var: ``[C]`` or None, like ``running_mean``.
        weight: w, ``[C]``; None means 1. Any floating dtype.
        bias: b, ``[C]``; None means 0. Any floating dtype.
        training: normalise with the statistics of the batch.
        momentum: share of the batch in the running statistics; None for the cumulative average, 1 /
            batches so far.
        eps: added to the variance; positive in training.
        num_batches_tracked: int64, 0-d; incremented when ``training``.
        activation: f by name, see :func:`activation`; None for none.
        residual: r, added before the activation. Of input's shape and dtype it costs one read; any
            other that torch can add (broadcast, promoted) is added on its own.

    Returns:
        Input's shape and dtype; channels_last if ``input`` is, else contiguous. Statistics are fp32
        (fp64 for fp64).

    Raises:
        ValueError: one value per channel in training, eps not positive, an unknown activation.
        RuntimeError: a parameter of another size or device; a residual that cannot be added.
        NotImplementedError: ``input`` is not floating point.

    Source: Ioffe & Szegedy, Batch Normalization, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> import torch, fastnorm
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> fastnorm.functional.batch_norm(x, None, None, training=True, activation="relu")
        tensor([[0.0000, 0.0000],
                [1.0000, 1.0000]])
    """
    return by_way(
        dispatch.way("batch_norm", input, residual, weight, bias, running_mean, running_var),
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked,
        check_name(activation),
        residual,
    )


def torch_can(
    x: Tensor, weight: Tensor | None, running_mean: Tensor | None, momentum: float | None
) -> bool:
    """Whether torch's own function is a way to go: it cannot take parameters and statistics of two
    dtypes, nor average the statistics of all batches without reading their count, which waits for a
    device and breaks a graph."""
    if momentum is None and (torch.compiler.is_compiling() or not x.is_cpu):
        return False
    return weight is None or running_mean is None or weight.dtype is running_mean.dtype


def by_way(
    way: str | None,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """:func:`batch_norm` on the way that dispatch.way has found for input."""
    inside = residual is None or check_residual(input, residual)
    if not training:
        num_batches_tracked = None
    elif num_batches_tracked is not None and not countable(num_batches_tracked, input):
        momentum = counted(num_batches_tracked, momentum)
        num_batches_tracked = None
    fits = None
    forbidden = way is None and not torch_can(input, weight, running_mean, momentum)
    if way is not None or forbidden:
        fits = (
            served(input, training, (weight, bias, running_mean, running_var))
            and (eps > 0 or (eps == 0 and not training))
            and (running_mean is None) == (running_var is None)
            and (training or running_mean is not None)
        )
    if not fits:
        if num_batches_tracked is not None:
            momentum = counted(num_batches_tracked, momentum)
        return reference.native(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum or 0.0,
            eps,
            residual,
            activation,
        )
    name = activation if inside else "identity"
    settings = (training, momentum, eps, name)
    if forbidden and dispatch.transformed():
        y = reference.traced(
            input, residual if inside else None, weight, bias, running_mean, running_var,
            num_batches_tracked, training, momentum, eps, name,
        )  # fmt: skip
        return y if inside else reference.finish(y, residual, activation)
    if way is None:
        way = dispatch.way_to_op(
            "batch_norm", input, residual, weight, bias, running_mean, running_var
        )
    tensors = (weight, bias, running_mean, running_var, num_batches_tracked)
    x = input if input.is_contiguous() else layout.to_planes(input)
    if residual is None:
        y = _apply[way](x, None, *tensors, settings, way)
        return y  # type: ignore[no-any-return]
    added = layout.match(residual, layout.planes_like(input)) if inside else None
    y = _apply[way](x, added, *tensors, settings, way)
    return y if inside else reference.finish(y, residual, activation)
