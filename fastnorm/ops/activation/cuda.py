"""Activations on the CUDA extension (csrc/activation.cu): what its launchers are given."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastnorm import layout
from fastnorm.ops import launch
from fastnorm.ops.activation import (
    backward_outputs,
    forward_outputs,
    swish_backward_outputs,
    swish_forward_outputs,
)
from fastnorm.ops.activation.reference import wide_dtype
from fastnorm.ops.extension import extension


def activation_forward(x: Tensor, name: str) -> Tensor:
    y = forward_outputs(x, name)
    extension().activation_forward(y, x, name)
    return y


def activation_forward_(x: Tensor, y: Tensor, name: str) -> None:
    layout.overwrite(y, x, lambda x, y: extension().activation_forward(y, x, name))


def activation_backward(x: Tensor, dy: Tensor, name: str) -> Tensor:
    dx = backward_outputs(x, dy, name)
    extension().activation_backward(dx, x, dy, name)
    return dx


@functools.lru_cache(maxsize=4096)
def _plan(outer: int, channels: int, inner: int, dtype: torch.dtype, sms: int) -> tuple[Any, int]:
    """How the kernels cut a tensor of [outer, channels, inner], and how many partial sums that
    makes."""
    sizes = extension().swish_sizes(outer, channels, inner, dtype, sms)
    return sizes, extension().swish_partials(sizes, dtype)


def _sizes(x: Tensor, beta: Tensor) -> tuple[Any, int]:
    """A single beta scales one long channel."""
    channels = beta.numel()
    if channels == 1:
        outer, inner = 1, x.numel()
    elif x.is_contiguous():
        outer, inner = x.size(0), x.numel() // (x.size(0) * channels)
    else:  # channels adjacent
        outer, inner = x.numel() // channels, 1
    return _plan(outer, channels, inner, x.dtype, launch.processors(x.get_device()))


@launch.fills(swish_forward_outputs)
def swish_forward(x: Tensor, beta: Tensor, y: Tensor) -> None:
    if x.numel() > 0:
        sizes, _ = _sizes(x, beta)
        extension().swish_forward(y, x, beta, sizes)


@launch.fills(swish_backward_outputs)
def swish_backward(
    x: Tensor, dy: Tensor, beta: Tensor, needs: list[bool], dx: Tensor | None, dbeta: Tensor | None
) -> None:
    if x.numel() == 0:
        if dbeta is not None:
            dbeta.zero_()
        return
    sizes, count = _sizes(x, beta)
    partials = counters = None
    if dbeta is not None:
        partials = torch.empty(count, dtype=wide_dtype(x), device=x.device)
        counters = launch.counters(x, sizes.groups)
    extension().swish_backward(dx, dbeta, x, dy, beta, partials, counters, sizes)
