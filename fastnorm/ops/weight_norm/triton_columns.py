"""Weight norm over columns: v is the row-major matrix [A, K * B], one norm for every B adjacent
columns.

A middle dim, or the last (B = 1). A program owns whole channels: `width` columns, in one block of
them unless a single channel has more. A range that fits is HELD in registers and read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.weight_norm.triton_common import (
    APPLY,
    LONG,
    ONE,
    SUM,
    divide,
    length_of,
    projection,
    root,
)


@triton.jit
def _per_channel(sums, B, FORM: tl.constexpr, BLOCK_C: tl.constexpr):
    # the sum over each channel's adjacent columns, given to each of them
    if FORM == ONE:
        return sums
    if FORM == LONG:
        return tl.zeros((BLOCK_C,), sums.dtype) + tl.sum(sums, 0)
    channel = tl.arange(0, BLOCK_C) // B
    return tl.sum(tl.where(channel[:, None] == channel[None, :], sums[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["K", "A", "C_units", "width_units", "B", "blocks", "splits"])
def columns_forward_kernel(
    w_ptr,  # [A, K * B]
    norm_ptr,  # [K]
    partial_ptr,  # [SPLITS, groups, BLOCK_C]
    v_ptr,  # [A, K * B]
    g_ptr,  # [K]
    K,
    A,
    C_units,  # K * B, in ALIGN elements
    width_units,  # columns of a program, in ALIGN elements
    B,
    blocks,  # of each split
    splits,
    EPS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,
    FORM: tl.constexpr,
    LARGE: tl.constexpr,
    PHASE: tl.constexpr,
):
    wide: tl.constexpr = norm_ptr.dtype.element_ty
    C, width = C_units * ALIGN, width_units * ALIGN
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a, column = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_C)
    first = group * width
    start = split * blocks * BLOCK_A
    inside = (column < width) & (first + column < C)
    k = group * (width // B) + column // B
    offsets = (a.to(tl.int64) if LARGE else a)[:, None] * C + column[None, :]
    v_ptr += first
    w_ptr += first
    if HELD:
        held = (a < A)[:, None] & inside[None, :]
        v = tl.load(v_ptr + offsets, mask=held, other=0.0).to(wide)
        squares = _per_channel(tl.sum(v * v, 0), B, FORM, BLOCK_C)
    elif PHASE != APPLY:
        total = tl.zeros((BLOCK_A, BLOCK_C), wide)
        for i in range(blocks):
            row = start + i * BLOCK_A
            for c in range(0, width, BLOCK_C):
                mask = (row + a < A)[:, None] & (inside & (c + column < width))[None, :]
                x = tl.load(v_ptr + row * C + c + offsets, mask=mask, other=0.0).to(wide)
                total += x * x
        squares = _per_channel(tl.sum(total, 0), B, FORM, BLOCK_C)
        if PHASE == SUM:
            tl.store(partial_ptr + (split * tl.num_programs(0) + group) * BLOCK_C + column, squares)
    else:
        merge = tl.arange(0, SPLITS)
        groups = tl.num_programs(0)
        parts = (merge[:, None] * groups + group) * BLOCK_C + column[None, :]
        squares = tl.sum(tl.load(partial_ptr + parts, mask=(merge < splits)[:, None], other=0.0), 0)
    if PHASE != SUM:
        norm = tl.where(inside, root(squares), 1.0)
        if split == 0:
            tl.store(norm_ptr + k, norm, mask=inside & (column % B == 0))
        g = tl.load(g_ptr + k, mask=inside, other=0.0).to(wide)
        scale = divide(g, length_of(norm, EPS))[None, :]
        if HELD:
            tl.store(w_ptr + offsets, (v * scale).to(w_ptr.dtype.element_ty), mask=held)
        else:
            for i in range(blocks):
                row = start + i * BLOCK_A
                for c in range(0, width, BLOCK_C):
                    mask = (row + a < A)[:, None] & (inside & (c + column < width))[None, :]
                    x = tl.load(v_ptr + row * C + c + offsets, mask=mask, other=0.0).to(wide)
                    tl.store(
                        w_ptr + row * C + c + offsets,
                        (x * scale).to(w_ptr.dtype.element_ty),
                        mask=mask,
                    )


@triton.jit(do_not_specialize=["K", "A", "C_units", "width_units", "B", "blocks", "splits"])
def columns_backward_kernel(
    dv_ptr,  # [A, K * B]
    dg_ptr,  # [K]
    partial_ptr,  # [SPLITS, groups, BLOCK_C]
    v_ptr,  # [A, K * B]
    g_ptr,  # [K]
    norm_ptr,  # [K]
    dw_ptr,  # [A, K * B]
    K,
    A,
    C_units,  # K * B, in ALIGN elements
    width_units,  # columns of a program, in ALIGN elements
    B,
    blocks,  # of each split
    splits,
    EPS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,
    FORM: tl.constexpr,
    LARGE: tl.constexpr,
    PHASE: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    NEEDS_DG: tl.constexpr,
):
    wide: tl.constexpr = norm_ptr.dtype.element_ty
    C, width = C_units * ALIGN, width_units * ALIGN
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    a, column = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_C)
    first = group * width
    start = split * blocks * BLOCK_A
    inside = (column < width) & (first + column < C)
    k = group * (width // B) + column // B
    offsets = (a.to(tl.int64) if LARGE else a)[:, None] * C + column[None, :]
    v_ptr += first
    dw_ptr += first
    if HELD:
        held = (a < A)[:, None] & inside[None, :]
        v = tl.load(v_ptr + offsets, mask=held, other=0.0).to(wide)
        dw = tl.load(dw_ptr + offsets, mask=held, other=0.0).to(wide)
        dot = _per_channel(tl.sum(v * dw, 0), B, FORM, BLOCK_C)
    elif PHASE != APPLY:
        total = tl.zeros((BLOCK_A, BLOCK_C), wide)
        for i in range(blocks):
            row = start + i * BLOCK_A
            for c in range(0, width, BLOCK_C):
                mask = (row + a < A)[:, None] & (inside & (c + column < width))[None, :]
                x = tl.load(v_ptr + row * C + c + offsets, mask=mask, other=0.0).to(wide)
                total += x * tl.load(dw_ptr + row * C + c + offsets, mask=mask, other=0.0).to(wide)
        dot = _per_channel(tl.sum(total, 0), B, FORM, BLOCK_C)
        if PHASE == SUM:
            tl.store(partial_ptr + (split * tl.num_programs(0) + group) * BLOCK_C + column, dot)
    else:
        merge = tl.arange(0, SPLITS)
        groups = tl.num_programs(0)
        parts = (merge[:, None] * groups + group) * BLOCK_C + column[None, :]
        dot = tl.sum(tl.load(partial_ptr + parts, mask=(merge < splits)[:, None], other=0.0), 0)
    if PHASE != SUM:
        norm = tl.load(norm_ptr + k, mask=inside, other=1.0)
        length = length_of(norm, EPS)
        if NEEDS_DG:
            if split == 0:
                dg = divide(dot, length).to(dg_ptr.dtype.element_ty)
                tl.store(dg_ptr + k, dg, mask=inside & (column % B == 0))
        if NEEDS_DV:
            dv_ptr += first
            scale = divide(tl.load(g_ptr + k, mask=inside, other=0.0).to(wide), length)[None, :]
            along = projection(dot, norm, length, EPS)[None, :]
            if HELD:
                tl.store(
                    dv_ptr + offsets,
                    (scale * (dw - along * v)).to(dv_ptr.dtype.element_ty),
                    mask=held,
                )
            else:
                for i in range(blocks):
                    row = start + i * BLOCK_A
                    for c in range(0, width, BLOCK_C):
                        mask = (row + a < A)[:, None] & (inside & (c + column < width))[None, :]
                        x = tl.load(v_ptr + row * C + c + offsets, mask=mask, other=0.0).to(wide)
                        dx = tl.load(dw_ptr + row * C + c + offsets, mask=mask, other=0.0).to(wide)
                        dv = (scale * (dx - along * x)).to(dv_ptr.dtype.element_ty)
                        tl.store(dv_ptr + row * C + c + offsets, dv, mask=mask)
