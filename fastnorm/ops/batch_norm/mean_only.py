"""Mean-only batch norm: what batch norm's kernels do to the mean alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastnorm import dispatch, layout
from fastnorm.ops.batch_norm import (
    Gradients,
    check_parameters,
    countable,
    counted,
    reference,
    served,
)
from fastnorm.ops.registry import applied, by_formula, register


def forward_outputs(x: Tensor, *_: Any) -> Tensor:
    return layout.planes_like(x)


def backward_outputs(
    dy: Tensor, bias: Tensor | None, batch_stats: bool, needs: list[bool]
) -> Gradients:
    return (
        layout.planes_like(dy) if needs[0] else None,
        torch.empty_like(bias) if bias is not None and needs[1] else None,
    )


_forward = register(
    "batch_norm",
    "mean_only_batch_norm_forward",
    "(Tensor x, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? num_batches_tracked, "
    "bool batch_stats, "
    "float? momentum) -> Tensor",
    forward_outputs,
)
_backward = register(
    "batch_norm",
    "mean_only_batch_norm_backward",
    "(Tensor dy, Tensor? bias, bool batch_stats, bool[2] needs) -> (Tensor?, Tensor?)",
    backward_outputs,
)


class MeanOnlyBatchNormFunction(torch.autograd.Function):
    """dx = dy - mean(dy): nothing is saved but the bias, for its dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        running_mean: Tensor | None,
        num_batches_tracked: Tensor | None,
        batch_stats: bool,
        momentum: float | None,
        way: str,
    ) -> Tensor:
        ctx.save_for_backward(bias)
        ctx.set_materialize_grads(False)
        y: Tensor = _forward.by[way](
            x, bias, running_mean, num_batches_tracked, batch_stats, momentum
        )
        ctx.batch_stats, ctx.strides = batch_stats, y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        if dy is None:
            return (None,) * 7
        (bias,) = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if by_formula(dy):  # linear in x and bias: the gradients depend on dy alone
            dims = [0, *range(2, dy.dim())]
            dx = dy - dy.mean(dims, keepdim=True) if ctx.batch_stats else dy
            dbias = dy.sum(dims).to(bias.dtype) if needs[1] else None
        else:
            through = needs[0] and not ctx.batch_stats  # dx is dy itself
            dy_in_place = layout.restride(dy, ctx.strides)
            dx, dbias = _backward(
                dy_in_place, bias, ctx.batch_stats, [needs[0] and not through, needs[1]]
            )
            dx = dy if through else dx
        return (dx if needs[0] else None), dbias, *[None] * 5


_apply = applied(MeanOnlyBatchNormFunction)


def mean_only_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    *,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Mean-only batch normalisation: centre each channel, leave its scale (to weight norm,
    usually).

    .. math:: y = x - \\mathrm{E}[x] + b, \\qquad dx = dy - \\mathrm{E}[dy]

    with E per channel: of the batch when ``training`` (the running mean moves towards it), else the
    running mean.

    Args:
        input: ``[N, C, ...]``, floating point, any strides.
        running_mean: ``[C]`` or None; updated in place when ``training``.
        bias: b, ``[C]``; None means 0.
        training: centre with the mean of the batch.
        momentum: share of the batch in the running mean; None for the cumulative average.
        num_batches_tracked: int64, 0-d; incremented when ``training``.

    Returns:
        Input's shape and dtype; channels_last if ``input`` is, else contiguous. Nothing is saved
        for backward.

    Raises:
        ValueError: one value per channel in training, fewer than two dimensions, or neither mean to
            centre with.
        RuntimeError: a parameter of another size or device.
        NotImplementedError: ``input`` is not floating point.

    Source: Salimans & Kingma, Weight Normalization, 2016, section 3,
    https://arxiv.org/abs/1602.07868

    Example:
        >>> import torch, fastnorm
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> fastnorm.functional.mean_only_batch_norm(x, None, training=True)
        tensor([[-1.],
                [ 1.]])
    """
    if input.dim() < 2:
        raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    if not training:
        num_batches_tracked = None
    if num_batches_tracked is not None and not (
        countable(num_batches_tracked, input) and served(input, True, (bias, running_mean))
    ):
        momentum = counted(num_batches_tracked, momentum)
        num_batches_tracked = None
    if not input.is_floating_point():
        raise NotImplementedError(f'"mean_only_batch_norm" not implemented for {input.dtype}')
    check_parameters(input, running_mean=running_mean, bias=bias)
    if training and input.numel() == input.size(1):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )
    if not training and running_mean is None:
        raise ValueError(
            "expected running_mean in evaluation mode: there is no other mean to centre with"
        )
    if input.numel() == 0:
        return reference.mean_only_composite(input, bias, None if training else running_mean)
    way = dispatch.way("batch_norm", input, bias, running_mean)
    if way is None and dispatch.transformed():
        if training:
            with torch.no_grad():
                reference.mean_only_statistics(input, running_mean, num_batches_tracked, momentum)
        return reference.mean_only_composite(input, bias, None if training else running_mean)
    tensors = (bias, running_mean, num_batches_tracked)
    if way is None:
        way = dispatch.way_to_op("batch_norm", input, bias, running_mean)
    y: Tensor = _apply[way](layout.to_planes(input), *tensors, training, momentum, way)
    return y
