"""Batch norm on Triton: the launchers of triton_forward.py, triton_backward.py and
triton_sync.py."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from fastnorm.ops import launch
from fastnorm.ops.activation.triton_values import ACTIVATIONS
from fastnorm.ops.batch_norm import backward_outputs, forward_outputs, mean_only, sync
from fastnorm.ops.batch_norm.composite import keeps_output
from fastnorm.ops.batch_norm.plan import plan
from fastnorm.ops.batch_norm.triton_backward import (
    backward_owner_kernel,
    backward_pass_kernel,
    backward_ticket_kernel,
)
from fastnorm.ops.batch_norm.triton_forward import (
    forward_owner_kernel,
    forward_running_kernel,
    forward_ticket_kernel,
)
from fastnorm.ops.batch_norm.triton_launch import (
    counters,
    grid,
    options,
    order,
    sizes,
    wide_type,
    workspace,
)
from fastnorm.ops.batch_norm.triton_sync import (
    apply_kernel,
    merge_ranks_kernel,
    statistics_kernel,
)

MERGE_TILE = 8, 128  # ranks, channels


def _compact(*parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters as the kernels read them: [C] without gaps, of slices and expansions too."""
    return [None if p is None else p.contiguous() for p in parameters]


def _put_back(buffers: tuple[Tensor | None, ...], moved: tuple[Tensor | None, ...]) -> None:
    """Copy what a kernel has written to the compact copies of running statistics with gaps."""
    for buffer, value in zip(buffers, moved, strict=True):
        if buffer is not None and value is not None and value is not buffer:
            buffer.copy_(value)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, eps: float, activation: str,
    y: Tensor, statistics: Tensor | None, center_only: bool,
) -> None:  # fmt: skip
    mean, rstd = (None, None) if statistics is None else statistics
    buffers = (running_mean, running_var)
    weight, bias, running_mean, running_var = _compact(weight, bias, *buffers)
    p = plan(x, y, 1 if residual is None else 2, one_pass=not batch_stats)
    constants: dict[str, Any] = dict(
        p.constants,
        VALUE=ACTIVATIONS[activation][0],
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        CENTER_ONLY=center_only,
        WIDE=wide_type(x),
        **options(x, p, light=batch_stats),
    )
    if not batch_stats:
        forward_running_kernel[grid(p)](
            y, mean, rstd, x, residual, weight, bias, running_mean, running_var,
            *launch.split(eps), *sizes(p), **constants
        )  # fmt: skip
        return
    track = num_batches_tracked is not None
    kernel = forward_owner_kernel if p.owner else forward_ticket_kernel
    kernel[(p.groups if p.owner else 2 * p.groups * p.shares,)](
        y, mean, rstd, running_mean, running_var, num_batches_tracked, x, residual, weight, bias,
        None if p.owner else workspace(x, p),
        counters(x, p) if track or not p.owner else None,
        *launch.split(momentum or 0.0), *launch.split(eps), *sizes(p), *order(p),
        UPDATE_MEAN=running_mean is not None, UPDATE_VAR=running_var is not None, TRACK=track,
        CUMULATIVE=momentum is None and track,
        **constants,
    )  # fmt: skip
    _put_back(buffers, (running_mean, running_var))


@launch.fills(forward_outputs)
def batch_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, eps: float, activation: str,
    y: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    _forward(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, batch_stats,
        momentum, eps, activation,
        y, statistics, center_only=False,
    )  # fmt: skip


@launch.fills(mean_only.forward_outputs)
def mean_only_batch_norm_forward(
    x: Tensor, bias: Tensor | None, running_mean: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, y: Tensor,
) -> None:  # fmt: skip
    _forward(
        x, None, None, bias, running_mean, None, num_batches_tracked,
        batch_stats, momentum, 0.0, "identity",
        y, None, center_only=True,
    )  # fmt: skip


def _what(kept: Tensor | None, activation: str) -> str:
    """Which of the tensors that composite.keep chooses from is kept, as KEPT says it."""
    if kept is None:
        return ""
    return "y" if keeps_output(activation) else "residual"


def _backward(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor | None, batch_stats: bool, activation: str,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dresidual: Tensor | None,
    center_only: bool,
) -> None:  # fmt: skip
    mean, rstd = (None, None) if statistics is None else statistics
    weight, bias = _compact(weight, bias)
    operands = 1 if center_only else 2 if kept is None else 3
    one_pass = not (batch_stats and dx is not None)
    p = plan(x, dy, operands, one_pass)
    writes = dx is not None or dresidual is not None
    reduces = dweight is not None or dbias is not None
    constants: dict[str, Any] = dict(
        p.constants,
        SLOPE=ACTIVATIONS[activation][1],
        PLAIN=activation == "identity",
        KEPT=_what(kept, activation),
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        CENTER_ONLY=center_only,
        NEED_DX=dx is not None,
        NEED_DRESIDUAL=dresidual is not None,
        NEED_DWEIGHT=dweight is not None,
        NEED_DBIAS=dbias is not None,
        WIDE=wide_type(x),
        **options(x, p, light=not one_pass and kept is None),
    )
    tensors = (dx, dweight, dbias, dresidual, dy, x, kept, weight, bias, mean, rstd)
    if not one_pass:
        kernel = backward_owner_kernel if p.owner else backward_ticket_kernel
        kernel[(p.groups if p.owner else 2 * p.groups * p.shares,)](
            *tensors,
            None if p.owner else workspace(x, p),
            None if p.owner else counters(x, p),
            *sizes(p), *order(p),
            **constants,
        )  # fmt: skip
    elif writes or reduces:
        backward_pass_kernel[grid(p)](
            *tensors,
            workspace(x, p) if reduces else None,
            counters(x, p) if reduces else None,
            *sizes(p),
            REDUCE=reduces,
            **constants,
        )  # fmt: skip


@launch.fills(backward_outputs)
def batch_norm_backward(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, batch_stats: bool, activation: str, needs: list[bool],
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dresidual: Tensor | None,
) -> None:  # fmt: skip
    _backward(
        x, dy, kept, weight, bias, statistics, batch_stats, activation, dx, dweight, dbias,
        dresidual,
        center_only=False,
    )  # fmt: skip


@launch.fills(mean_only.backward_outputs)
def mean_only_batch_norm_backward(
    dy: Tensor,
    bias: Tensor | None,
    batch_stats: bool,
    needs: list[bool],
    dx: Tensor | None,
    dbias: Tensor | None,
) -> None:
    _backward(
        dy,
        dy,
        None,
        None,
        None,
        None,
        batch_stats,
        "identity",
        dx,
        None,
        dbias,
        None,
        center_only=True,
    )


@launch.fills(sync.statistics_outputs)
def batch_norm_statistics(x: Tensor, statistics: Tensor) -> None:
    p = plan(x, x, operands=1, one_pass=True)
    statistics_kernel[grid(p)](
        statistics, x, workspace(x, p), counters(x, p), *sizes(p),
        **p.constants, WIDE=wide_type(x), **options(x, p),
    )  # fmt: skip


@launch.fills(sync.merge_outputs)
def batch_norm_merge(
    gathered: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None, momentum: float | None,
    mean: Tensor, var: Tensor, count: Tensor,
) -> None:  # fmt: skip
    buffers = (running_mean, running_var)
    running_mean, running_var = _compact(*buffers)
    track, block = num_batches_tracked is not None, MERGE_TILE[1]
    merge_ranks_kernel[(triton.cdiv(mean.numel(), block),)](
        mean, var, count, running_mean, running_var, num_batches_tracked,
        gathered, launch.counters(gathered, 2) if track else None,
        *launch.split(momentum or 0.0), gathered.size(0), mean.numel(),
        UPDATE_MEAN=running_mean is not None, UPDATE_VAR=running_var is not None, TRACK=track,
        CUMULATIVE=momentum is None and track,
        BLOCK_R=MERGE_TILE[0], BLOCK_C=block, WIDE=wide_type(gathered), enable_fp_fusion=True,
    )  # fmt: skip
    _put_back(buffers, (running_mean, running_var))


@launch.fills(sync.reduce_outputs)
def batch_norm_reduce(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, activation: str,
    sum_dz: Tensor, sum_dz_x_hat: Tensor,
) -> None:  # fmt: skip
    # the gradients of a bias and a weight of wide dtype are these sums
    _backward(
        x, dy, kept, weight, bias, statistics, False, activation,
        None, sum_dz_x_hat, sum_dz, None, center_only=False,
    )  # fmt: skip


@launch.fills(sync.apply_outputs)
def batch_norm_apply(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, sums: Tensor, count: Tensor, activation: str, needs_dresidual: bool,
    dx: Tensor, dresidual: Tensor | None,
) -> None:  # fmt: skip
    weight, bias = _compact(weight, bias)
    p = plan(x, dy, operands=2 if kept is None else 3, one_pass=True)
    apply_kernel[grid(p)](
        dx, dresidual, dy, x, kept, weight, bias, *statistics, sums, count,
        *sizes(p),
        SLOPE=ACTIVATIONS[activation][1], PLAIN=activation == "identity",
        KEPT=_what(kept, activation), HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        NEED_DRESIDUAL=needs_dresidual, **p.constants, WIDE=wide_type(x), **options(x, p),
    )  # fmt: skip
