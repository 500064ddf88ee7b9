"""Batch norm on the CUDA extension (csrc/batch_norm*.cu): what its launchers are given."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastnorm import layout
from fastnorm.ops import launch
from fastnorm.ops.activation.reference import wide_dtype
from fastnorm.ops.extension import activation_code, address, array, dtype_code, extension, stream

# a form (a position in the extension's BATCH_NORM_FORMS) and a tile's number of batches, for tests:
# the closed rule of csrc/batch_norm_plan.cu chooses where they are -1 and 0
FORM, BATCHES = -1, 0


def _compact(*parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters as the kernels read them: [C] without gaps, of slices and expansions too."""
    return [None if p is None else p.contiguous() for p in parameters]


def _put_back(buffers: tuple[Tensor | None, ...], moved: tuple[Tensor | None, ...]) -> None:
    """Copy what a kernel has written to the compact copies of running statistics with gaps."""
    for buffer, value in zip(buffers, moved, strict=True):
        if buffer is not None and value is not None and value is not buffer:
            buffer.copy_(value)


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, strides: tuple[int, ...], y_strides: tuple[int, ...], dtype: torch.dtype,
    device: torch.device, *rest: Any,
) -> Any:  # fmt: skip
    # tensors without data: what decides is looked up by shape and strides, and views cost time
    view, out = (
        layout.planes(torch.empty_strided(shape, steps, dtype=dtype, device="meta"))
        for steps in (strides, y_strides)
    )
    assert view is not None
    assert out is not None
    y_last = out.size(1) > 1 and out.stride(1) == 1
    return extension().batch_norm_plan(
        *view.shape, *view.stride(), y_last, dtype_code(dtype), *rest
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
    return _plan(
        x.shape, x.stride(), y.stride(), x.dtype, x.device,
        activation_code(activation), backward, one_pass, operands, extras, FORM, BATCHES,
    )  # fmt: skip


def workspace(x: Tensor, p: Any) -> Tensor | None:
    """What the blocks of a group leave for each other."""
    return torch.empty(p.partials, dtype=wide_dtype(x), device=x.device) if p.partials else None


def _running(
    mean: Tensor | None, var: Tensor | None, num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> Any:  # fmt: skip
    cumulative = momentum is None and num_batches_tracked is not None
    return extension().BatchNormRunning(
        *array(mean), *array(var), address(num_batches_tracked), momentum or 0.0, cumulative
    )


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, eps: float, activation: str,
    y: Tensor, mean: Tensor | None, rstd: Tensor | None, center_only: bool,
) -> None:  # fmt: skip
    buffers = (running_mean, running_var)
    weight, bias, running_mean, running_var = _compact(weight, bias, *buffers)
    p = plan(x, y, activation, False, not batch_stats, 1, int(residual is not None))
    partials = workspace(x, p) if batch_stats else None
    counters = None
    if batch_stats and (p.ordered or num_batches_tracked is not None):
        counters = launch.counters(x, p.counters)
    extension().batch_norm_forward(
        y.data_ptr(), address(mean), address(rstd), 0,
        _running(running_mean, running_var, num_batches_tracked, momentum),
        x.data_ptr(), address(residual), *array(weight), *array(bias),
        address(partials), address(counters), eps, activation_code(activation),
        batch_stats, center_only, p, dtype_code(x.dtype), stream(x),
    )  # fmt: skip
    if batch_stats:
        _put_back(buffers, (running_mean, running_var))


def batch_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, eps: float, activation: str,
    y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    _forward(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, batch_stats,
        momentum, eps, activation,
        y, mean, rstd, center_only=False,
    )  # fmt: skip


def mean_only_batch_norm_forward(
    x: Tensor, bias: Tensor | None, running_mean: Tensor | None, num_batches_tracked: Tensor | None,
    batch_stats: bool, momentum: float | None, y: Tensor,
) -> None:  # fmt: skip
    _forward(
        x, None, None, bias, running_mean, None, num_batches_tracked,
        batch_stats, momentum, 0.0, "identity",
        y, None, None, center_only=True,
    )  # fmt: skip


def _backward(
    x: Tensor, dy: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, sums: Tensor | None, count: Tensor | None,
    batch_stats: bool, activation: str,
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dresidual: Tensor | None,
    center_only: bool,
) -> None:  # fmt: skip
    """dx from the batch's statistics unless they are the running ones or the sums are given."""
    if dx is None and dweight is None and dbias is None and dresidual is None:
        return
    residual = None if activation == "identity" else residual
    weight, bias = _compact(weight, bias)
    operands = 1 if center_only else 2 if residual is None else 3
    p = plan(x, dy, activation, True, not batch_stats or dx is None, operands, 0)
    merges = p.ordered and (batch_stats or dweight is not None or dbias is not None)
    partials = workspace(x, p) if merges else None
    counters = launch.counters(x, p.counters) if merges else None
    extension().batch_norm_backward(
        address(dx), address(dresidual), *array(dweight), *array(dbias),
        0 if center_only else x.data_ptr(), dy.data_ptr(), address(residual),
        *array(weight), *array(bias), address(mean), address(rstd), address(sums), address(count),
        address(partials), address(counters), activation_code(activation), center_only,
        p, dtype_code(x.dtype), stream(x),
    )  # fmt: skip


def batch_norm_backward(
    x: Tensor, dy: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, batch_stats: bool, activation: str, needs: list[bool],
    dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, dresidual: Tensor | None,
) -> None:  # fmt: skip
    _backward(
        x, dy, residual, weight, bias, mean, rstd, None, None, batch_stats, activation,
        dx, dweight, dbias, dresidual, center_only=False,
    )  # fmt: skip


def mean_only_batch_norm_backward(
    dy: Tensor,
    bias: Tensor | None,
    batch_stats: bool,
    needs: list[bool],
    dx: Tensor | None,
    dbias: Tensor | None,
) -> None:
    _backward(
        dy, dy, None, None, None, None, None, None, None, batch_stats, "identity",
        dx, None, dbias, None, center_only=True,
    )  # fmt: skip


def batch_norm_reduce(
    x: Tensor, dy: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, activation: str,
    sum_dz: Tensor, sum_dz_x_hat: Tensor,
) -> None:  # fmt: skip
    # the gradients of a bias and a weight of wide dtype are these sums
    _backward(
        x, dy, residual, weight, bias, mean, rstd, None, None, False, activation,
        None, sum_dz_x_hat, sum_dz, None, center_only=False,
    )  # fmt: skip


def batch_norm_apply(
    x: Tensor, dy: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, sums: Tensor, count: Tensor, activation: str, needs_dresidual: bool,
    dx: Tensor, dresidual: Tensor | None,
) -> None:  # fmt: skip
    _backward(
        x, dy, residual, weight, bias, mean, rstd, sums, count, False, activation,
        dx, None, None, dresidual, center_only=False,
    )  # fmt: skip


def batch_norm_statistics(x: Tensor, statistics: Tensor) -> None:
    p = plan(x, x, "identity", False, True, 1, 0)
    partials = workspace(x, p)
    counters = launch.counters(x, p.counters) if p.ordered else None
    C, size = x.size(1), statistics.element_size()
    mean = statistics.data_ptr()
    extension().batch_norm_forward(
        0, mean, mean + C * size, mean + 2 * C * size, _running(None, None, None, None),
        x.data_ptr(), 0, *array(None), *array(None),
        address(partials), address(counters), 0.0, activation_code("identity"),
        True, False, p, dtype_code(x.dtype), stream(x),
    )  # fmt: skip


def batch_norm_merge(
    gathered: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    num_batches_tracked: Tensor | None, momentum: float | None,
    mean: Tensor, var: Tensor, count: Tensor,
) -> None:  # fmt: skip
    buffers = (running_mean, running_var)
    running_mean, running_var = _compact(*buffers)
    counters = None if num_batches_tracked is None else launch.counters(gathered, 2)
    extension().batch_norm_merge(
        mean.data_ptr(), var.data_ptr(), count.data_ptr(),
        _running(running_mean, running_var, num_batches_tracked, momentum),
        gathered.data_ptr(), address(counters), gathered.size(0), mean.numel(),
        dtype_code(gathered.dtype), stream(gathered),
    )  # fmt: skip
    _put_back(buffers, (running_mean, running_var))
