"""Activations on Triton: how the elementwise kernels and Swish's are launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnorm import layout
from fastnorm.ops import launch
from fastnorm.ops.activation import (
    backward_outputs,
    forward_outputs,
    swish_backward_outputs,
    swish_forward_outputs,
)
from fastnorm.ops.activation.triton_elementwise import backward_kernel, forward_kernel
from fastnorm.ops.activation.triton_swish import swish_backward_kernel, swish_forward_kernel
from fastnorm.ops.activation.triton_values import ACTIVATIONS
from fastnorm.ops.batch_norm.plan import plan
from fastnorm.ops.batch_norm.triton_launch import (
    counters,
    grid,
    options,
    sizes,
    wide_type,
    workspace,
)

BLOCK_BYTES = 8192  # of one operand: with four warps, four 16-byte loads per thread
# Fewer blocks than this have one load per thread: four blocks for each multiprocessor of an H100
# would leave some with twice the work of others.
SMALL_GRID = 512


def _elementwise(x: Tensor) -> tuple[tuple[int], tuple[int, bool], dict[str, Any]]:
    """(grid, sizes, constants)"""
    numel, block = x.numel(), BLOCK_BYTES // x.element_size()
    small = numel < SMALL_GRID * block
    grid = (triton.cdiv(numel, block // 4 if small else block),)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    constants = {"WIDE": wide, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}
    if wide == tl.float64:  # left to itself, ptxas spills 8 bytes to stay at 64
        constants["maxnreg"] = 128
    return grid, (numel, small), constants


def _forward(x: Tensor, name: str, y: Tensor) -> None:
    if x.numel() > 0:
        grid, sizes, constants = _elementwise(x)
        forward_kernel[grid](y, x, *sizes, VALUE=ACTIVATIONS[name][0], **constants)


activation_forward = launch.fills(forward_outputs)(_forward)


def activation_forward_(x: Tensor, y: Tensor, name: str) -> None:
    layout.overwrite(y, x, lambda x, y: _forward(x, name, y))


@launch.fills(backward_outputs)
def activation_backward(x: Tensor, dy: Tensor, name: str, dx: Tensor) -> None:
    if x.numel() > 0:
        grid, sizes, constants = _elementwise(x)
        backward_kernel[grid](dx, x, dy, *sizes, SLOPE=ACTIVATIONS[name][1], **constants)


def _as_planes(x: Tensor, beta: Tensor) -> Tensor:
    """x as the planes that beta scales: a single beta scales one long channel."""
    return x if beta.numel() > 1 else x.as_strided((1, 1, x.numel()), (x.numel(), x.numel(), 1))


@launch.fills(swish_forward_outputs)
def swish_forward(x: Tensor, beta: Tensor, y: Tensor) -> None:
    if x.numel() == 0:
        return
    p = plan(_as_planes(x, beta), _as_planes(y, beta), operands=1, one_pass=True)
    swish_forward_kernel[grid(p)](
        y, x, beta, *sizes(p), WIDE=wide_type(x), **p.constants, **options(x, p)
    )


@launch.fills(swish_backward_outputs)
def swish_backward(
    x: Tensor, dy: Tensor, beta: Tensor, needs: list[bool], dx: Tensor | None, dbeta: Tensor | None
) -> None:
    if x.numel() == 0:
        if dbeta is not None:
            dbeta.zero_()
        return
    p = plan(_as_planes(x, beta), _as_planes(dy, beta), operands=2, one_pass=True)
    swish_backward_kernel[grid(p)](
        dx, dbeta, x, dy, beta,
        workspace(x, p) if dbeta is not None else None,
        counters(x, p) if dbeta is not None else None,
        *sizes(p),
        NEED_DX=dx is not None, NEED_DBETA=dbeta is not None, WIDE=wide_type(x),
        **p.constants, **options(x, p),
    )  # fmt: skip
