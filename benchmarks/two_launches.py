"""Batch norm in two launches each way, which read everything twice: what synchronised batch norm
does in a group of one process. It is the form that the others are measured against, and the one to
take where a channel does not fit on the chip.

Between the two there is a small one each way, which in a larger group follows the collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Problem
from fastnorm import layout
from fastnorm.ops.activation import check_name
from fastnorm.ops.batch_norm import _forward, sync

LAUNCHES = 1  # each way, of a candidate of tune; 2: those of this file
EPS, MOMENTUM = 1e-5, 0.1


class TwoLaunches(torch.autograd.Function):
    """Saves what batch norm's own Function saves."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, x: Tensor, weight: Tensor, bias: Tensor,
        running_mean: Tensor, running_var: Tensor, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mean, var, count = sync._merge(
            sync._statistics(x)[None], running_mean, running_var, None, MOMENTUM
        )
        y, statistics = _forward(
            x, residual, weight, bias, mean, var, None, False, None, EPS, activation
        )
        plain = activation == "identity"
        ctx.save_for_backward(x, None if plain else residual, weight, bias, statistics, count)
        ctx.activation = activation
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *given, count = ctx.saved_tensors
        x, residual, weight, bias, statistics = given
        dy_in_place = layout.match(dy, layout.planes_like(x))
        given = x, dy_in_place, residual, weight, bias, statistics
        sum_dz, sum_dz_x_hat = sync._reduce(*given, ctx.activation)
        sums = torch.cat([sum_dz, sum_dz_x_hat])
        hidden = residual is not None
        dx, dresidual = sync._apply(*given, sums, count, ctx.activation, hidden)
        if ctx.needs_input_grad[-1] and not hidden:  # no activation hides it
            dresidual = dy
        return None, dx, sum_dz_x_hat.to(weight.dtype), sum_dz.to(bias.dtype), None, None, dresidual


def ours(problem: Problem) -> Callable[..., Tensor]:
    """A function of a batch norm problem's tensors, as benchmarks/ops.py makes them."""
    names = [name for name in problem.variant.split("+") if name not in ("plain", "residual")]
    activation = check_name(names[0] if names else None)

    # called as every provider's function is, with the tensors of an op's arguments
    def run(x, weight, bias, running_mean, running_var, residual=None):  # type: ignore[no-untyped-def]
        planes = layout.to_planes(x)
        if residual is not None:
            residual = layout.match(residual, layout.planes_like(planes))
        given = planes, weight, bias, running_mean, running_var, residual
        # autograd.Function.apply is untyped in torch
        return TwoLaunches.apply(activation, *given)  # type: ignore[no-untyped-call]

    return run
