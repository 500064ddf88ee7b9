"""Batch norm on the CUDA extension (csrc/batch_norm*.cu): what its launchers are given."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastnorm import layout
from fastnorm.ops import launch
from fastnorm.ops.activation.reference import wide_dtype
from fastnorm.ops.batch_norm import backward_outputs, forward_outputs, mean_only, sync
from fastnorm.ops.batch_norm.composite import keeps_output
from fastnorm.ops.extension import extension

# for tests and measurements: where one is -1, the closed rule of csrc/batch_norm_plan.cu chooses
FORM = -1  # a position in the extension's BATCH_NORM_FORMS
BATCHES = -1  # of a tile
COLUMNS = -1  # of a group: channels, or 16 bytes of channels in channels_last
BLOCKS = -1  # of a multiprocessor, that shared memory is given out for
LAG = -1  # of a ticket, in hundredths of the resident blocks
HINTS = -1  # 0: L2 is not told what is read again


@functools.lru_cache(maxsize=4096)
def _plan(
    device: int, shape: torch.Size, strides: tuple[tuple[int, ...], ...] | None,
    dtype: torch.dtype, activation: str, *rest: Any,
) -> Any:  # fmt: skip
    # tensors without data: what decides is looked up by shape and strides, and views cost time
    contiguous = torch.empty(shape, dtype=dtype, device="meta")
    view, out = (
        layout.planes(contiguous.new_empty_strided(shape, steps))
        for steps in strides or (contiguous.stride(),) * 2
    )
    assert view is not None
    assert out is not None
    y_last = out.size(1) > 1 and out.stride(1) == 1
    return extension().batch_norm_plan(
        *view.shape, *view.stride(), y_last, dtype, activation, *rest
    )


def plan(
    x: Tensor,
    y: Tensor,
    activation: str,
    backward: bool,
    one_pass: bool,
    operands: int,
    extras: int,
) -> Any:
    """Cut x (any strides that layout.to_planes leaves) and y (dense, layout.planes_like)."""
    strides = None if x.is_contiguous() else (x.stride(), y.stride())  # y is contiguous if x is
    return _plan(
        x.get_device(), x.shape, strides, x.dtype,
        activation, backward, one_pass, operands, extras,
        FORM, BATCHES, COLUMNS, BLOCKS, LAG, HINTS,
    )  # fmt: skip


def workspace(x: Tensor, p: Any) -> Tensor | None:
    """What the blocks of a group leave for each other."""
    return torch.empty(p.partials, dtype=wide_dtype(x), device=x.device) if p.partials else None


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, eps: float, activation: str,
    y: Tensor, statistics: Tensor | None, center_only: bool,
) -> None:  # fmt: skip
    p = plan(x, y, activation, False, not batch_stats, 1, int(residual is not None))
    partials = counters = None
    if batch_stats:
        if p.partials:
            partials = workspace(x, p)
        if p.ordered or num_batches_tracked is not None:
            counters = launch.counters(x, p.counters)
    extension().batch_norm_forward(
        y, statistics, running_mean, running_var, num_batches_tracked, momentum,
        x, residual, weight, bias, partials, counters, eps,
        activation, batch_stats, center_only, p,
    )  # fmt: skip


def batch_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, statistics = forward_outputs(x)
    _forward(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked,
        batch_stats, momentum, eps, activation, y, statistics, False,
    )  # fmt: skip
    return y, statistics


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


def _backward(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor | None, sums: Tensor | None, count: Tensor | None,
    batch_stats: bool, activation: str,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dresidual: Tensor | None,
    center_only: bool,
) -> None:  # fmt: skip
    """dx from the batch's statistics unless they are the running ones or the sums are given."""
    if dx is None and dweight is None and dbias is None and dresidual is None:
        return
    operands = 1 if center_only else 2 if kept is None else 3
    p = plan(x, dy, activation, True, not batch_stats or dx is None, operands, 0)
    merges = p.ordered and (batch_stats or dweight is not None or dbias is not None)
    partials = workspace(x, p) if merges else None
    counters = launch.counters(x, p.counters) if merges else None
    extension().batch_norm_backward(
        dx, dresidual, dweight, dbias, None if center_only else x, dy,
        kept, keeps_output(activation), weight, bias, statistics, sums, count, partials, counters,
        activation, center_only, p,
    )  # fmt: skip


@launch.fills(backward_outputs)
def batch_norm_backward(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, batch_stats: bool, activation: str, needs: list[bool],
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dresidual: Tensor | None,
) -> None:  # fmt: skip
    _backward(
        x, dy, kept, weight, bias, statistics, None, None, batch_stats, activation,
        dx, dweight, dbias, dresidual, center_only=False,
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
        dy, dy, None, None, None, None, None, None, batch_stats, "identity",
        dx, None, dbias, None, center_only=True,
    )  # fmt: skip


@launch.fills(sync.reduce_outputs)
def batch_norm_reduce(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, activation: str,
    sum_dz: Tensor, sum_dz_x_hat: Tensor,
) -> None:  # fmt: skip
    # the gradients of a bias and a weight of wide dtype are these sums
    _backward(
        x, dy, kept, weight, bias, statistics, None, None, False, activation,
        None, sum_dz_x_hat, sum_dz, None, center_only=False,
    )  # fmt: skip


@launch.fills(sync.apply_outputs)
def batch_norm_apply(
    x: Tensor, dy: Tensor, kept: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    statistics: Tensor, sums: Tensor, count: Tensor, activation: str, needs_dresidual: bool,
    dx: Tensor, dresidual: Tensor | None,
) -> None:  # fmt: skip
    _backward(
        x, dy, kept, weight, bias, statistics, sums, count, False, activation,
        dx, None, None, dresidual, center_only=False,
    )  # fmt: skip


@launch.fills(sync.statistics_outputs)
def batch_norm_statistics(x: Tensor, statistics: Tensor) -> None:
    p = plan(x, x, "identity", False, True, 1, 0)
    partials = workspace(x, p)
    counters = launch.counters(x, p.counters) if p.ordered else None
    extension().batch_norm_forward(
        None, statistics, None, None, None, None, x, None, None, None, partials, counters, 0.0,
        "identity", True, False, p,
    )  # fmt: skip


@launch.fills(sync.merge_outputs)
def batch_norm_merge(
    gathered: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None, momentum: float | None,
    mean: Tensor, var: Tensor, count: Tensor,
) -> None:  # fmt: skip
    counters = None if num_batches_tracked is None else launch.counters(gathered, 2)
    extension().batch_norm_merge(
        mean, var, count, running_mean, running_var, num_batches_tracked, momentum,
        gathered, counters, gathered.size(0), mean.numel(),
    )  # fmt: skip
