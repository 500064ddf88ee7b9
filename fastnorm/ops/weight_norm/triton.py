"""Weight norm on Triton, for every dim, as v seen [A, K, B]: a norm over A and B, one for each of
K.

triton_rows.py serves A = 1 (dim 0; the whole tensor as one row), triton_columns.py the rest. Where
whole norms are too few programs for the device, each range is split: a first launch writes the sums
of the parts, a second merges them, in fixed order, and writes the result. Otherwise, and for every
small tensor, one launch does both.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastnorm.ops import launch
from fastnorm.ops.weight_norm import backward_outputs, forward_outputs, group
from fastnorm.ops.weight_norm.reference import alone, canonical, norm_of
from fastnorm.ops.weight_norm.triton_columns import columns_backward_kernel, columns_forward_kernel
from fastnorm.ops.weight_norm.triton_common import APPLY, BOTH, LONG, ONE, SEVERAL, SUM
from fastnorm.ops.weight_norm.triton_rows import rows_backward_kernel, rows_forward_kernel

# of a tile that stays in registers; half in backward, which has two (v and dw), and half in loops
HELD_ELEMENTS = 8192
LOOP_ELEMENTS = 4096  # of a tile of a loop
SPLIT_FROM = 1 << 17  # elements: a smaller tensor takes one launch
MAX_SPLITS = 64  # partials that every program of the second launch merges


def _align(*sizes: int) -> int:
    """The largest power of two up to 16 that divides every size."""
    return next(n for n in (16, 8, 4, 2, 1) if all(size % n == 0 for size in sizes))


def _splits(v: Tensor, programs: int, blocks: int) -> int:
    """Into how many parts each range of `blocks` goes so that the device is busy."""
    if v.numel() < SPLIT_FROM or programs >= launch.processors(v.get_device()):
        return 1
    return max(1, min(2 * launch.processors(v.get_device()) // programs, blocks // 2, MAX_SPLITS))


# (groups, splits, entries of a partial, sizes, constexprs) of a launch
Plan = tuple[int, int, int, list[int], dict[str, int | bool]]


def _rows_plan(v: Tensor, K: int, B: int, held: int) -> Plan:
    block = min(triton.next_power_of_2(B), LOOP_ELEMENTS)
    fits = triton.next_power_of_2(B) <= held
    blocks = triton.cdiv(B, block)
    splits = _splits(v, K, blocks)
    if fits and splits == 1:
        block, blocks = triton.next_power_of_2(B), 1
    else:
        fits = False
    rows = max(1, min(2048 // block, triton.next_power_of_2(K))) if fits else 1
    per_split = triton.cdiv(blocks, splits)
    # a single row may have any length: no other row starts at it
    stride_align, align = (16 if K == 1 else _align(B)), _align(B)
    sizes = [
        K,
        0 if K == 1 else B // stride_align,
        B // align,
        per_split,
        triton.cdiv(blocks, per_split),
    ]
    constants: dict[str, int | bool] = {
        "ROWS": rows,
        "BLOCK": block,
        "STRIDE_ALIGN": stride_align,
        "ALIGN": align,
        "HELD": fits,
    }
    return triton.cdiv(K, rows), sizes[-1], 1, sizes, constants


def _columns_plan(
    v: Tensor, A: int, K: int, B: int, held: int
) -> tuple[int, int, int, list[int], dict[str, int | bool]]:
    C, block_c = K * B, 64 if B <= 16 else 128
    step = (
        _align(C) // _align(C, B) if B < 64 else 1
    )  # channels to the next column that a vector may start at
    step = min(step, 8)
    group = max(1, min(block_c // B // step * step or block_c // B, K)) if block_c >= B else 1
    width = group * B
    form = ONE if B == 1 else SEVERAL if block_c >= B else LONG
    block_a = min(triton.next_power_of_2(A), max(1, held // 2 // block_c))
    groups, blocks = triton.cdiv(K, group), triton.cdiv(A, block_a)
    splits = _splits(v, groups, blocks)
    fits = splits == 1 and width <= block_c and triton.next_power_of_2(A) * block_c <= held
    if fits:
        block_a, blocks = triton.next_power_of_2(A), 1
    per_split = triton.cdiv(blocks, splits)
    align = _align(C, width)
    sizes = [K, A, C // align, width // align, B, per_split, triton.cdiv(blocks, per_split)]
    constants: dict[str, int | bool] = {
        "BLOCK_A": block_a,
        "BLOCK_C": block_c,
        "ALIGN": align,
        "HELD": fits,
        "FORM": form.value,
        "LARGE": block_a * C >= 2**31,
    }
    return groups, sizes[-1], block_c, sizes, constants


def _launch(
    forward: bool,
    v: Tensor,
    norm: Tensor,
    dim: int | None,
    eps: float | None,
    arguments: list[list[Any]],
    **flags: Any,
) -> None:
    A, K, B = canonical(v.shape, dim)
    held = HELD_ELEMENTS if forward else HELD_ELEMENTS // 2
    if A == 1:
        kernel = rows_forward_kernel if forward else rows_backward_kernel
        groups, splits, entries, sizes, constants = _rows_plan(v, K, B, held)
    else:
        kernel = columns_forward_kernel if forward else columns_backward_kernel
        groups, splits, entries, sizes, constants = _columns_plan(v, A, K, B, held)
    # without a bound of its own ptxas spills 8 bytes on sm_100 to fit one more program
    bound = {"maxnreg": 128} if A > 1 and forward and v.dtype == torch.float32 else {}
    padded = triton.next_power_of_2(splits)
    partial = norm if splits == 1 else norm.new_empty(padded * groups * entries)
    outputs, inputs = arguments
    phases = (BOTH,) if splits == 1 else (SUM, APPLY)
    for phase in phases:
        # without dv the second launch has no elements to write: one program per group merges
        parts = 1 if phase.value == APPLY.value and flags.get("NEEDS_DV") is False else splits
        kernel[(groups, parts)](
            *outputs,
            partial,
            *inputs,
            *sizes,
            EPS=eps,
            SPLITS=padded,
            PHASE=phase.value,
            **constants,
            **flags,
            num_warps=8 if A > 1 and constants["BLOCK_C"] == 128 else 4,
            enable_fp_fusion=True,
            **bound,
        )


def _forward(
    v: Tensor, g: Tensor, dim: int | None, eps: float | None, w: Tensor, norm: Tensor
) -> None:
    _launch(True, v, norm, dim, eps, [[w, norm], [v, g]])


def _backward(
    v: Tensor,
    g: Tensor,
    norm: Tensor,
    dw: Tensor,
    dim: int | None,
    eps: float | None,
    needs: list[bool],
    dv: Tensor | None,
    dg: Tensor | None,
) -> None:
    _launch(
        False, v, norm, dim, eps, [[dv, dg], [v, g, norm, dw]], NEEDS_DV=needs[0], NEEDS_DG=needs[1]
    )


weight_norm_forward = launch.fills(forward_outputs)(_forward)
weight_norm_backward = launch.fills(backward_outputs)(_backward)


# of many layers: the launches of each, one after the other


@launch.fills(group.forward_outputs)
def weight_norm_group_forward(
    v: list[Tensor],
    g: list[Tensor],
    dim: list[int],
    eps: list[float],
    w: list[Tensor],
    norm: Tensor,
) -> None:
    begin = 0
    for i, x in enumerate(g):
        _forward(v[i], x, *alone(dim[i], eps[i]), w[i], norm_of(norm, begin, x))
        begin += x.numel()


@launch.fills(group.backward_outputs)
def weight_norm_group_backward(
    v: list[Tensor],
    g: list[Tensor],
    norm: Tensor,
    dw: list[Tensor],
    begin: list[int],
    dim: list[int],
    eps: list[float],
    needs_v: list[bool],
    needs_g: list[bool],
    dv: list[Tensor],
    dg: list[Tensor],
) -> None:
    every_dv, every_dg = iter(dv), iter(dg)
    for i, needs in enumerate(zip(needs_v, needs_g, strict=True)):
        _backward(
            v[i],
            g[i],
            norm_of(norm, begin[i], g[i]),
            dw[i],
            *alone(dim[i], eps[i]),
            list(needs),
            next(every_dv) if needs[0] else None,
            next(every_dg) if needs[1] else None,
        )
