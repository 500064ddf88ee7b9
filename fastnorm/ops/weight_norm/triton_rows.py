"""Weight norm over rows: v is [K, B], one norm for each row (dim 0), or one row (the whole tensor).

A tile is [ROWS, BLOCK]. A row that fits is HELD in registers and read once; longer rows are looped
over, ROWS = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.weight_norm.triton_common import APPLY, SUM, divide, length_of, projection, root


@triton.jit
def _load(ptr, offsets, mask, FULL, WIDE: tl.constexpr):
    # a full block is loaded without a mask: a length that no vector divides would spoil every load
    if FULL:
        x = tl.load(ptr + offsets)
    else:
        x = tl.load(ptr + offsets, mask=mask, other=0.0)
    return x.to(WIDE)


@triton.jit
def _store(ptr, offsets, x, mask, FULL):
    if FULL:
        tl.store(ptr + offsets, x.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["K", "stride_units", "B_units", "blocks", "splits"])
def rows_forward_kernel(
    w_ptr,  # [K, B]
    norm_ptr,  # [K]
    partial_ptr,  # [K, SPLITS]
    v_ptr,  # [K, B]
    g_ptr,  # [K]
    K,
    stride_units,  # between rows, in STRIDE_ALIGN elements
    B_units,  # in ALIGN elements
    blocks,  # of each split
    splits,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,
    PHASE: tl.constexpr,
):
    wide: tl.constexpr = norm_ptr.dtype.element_ty
    stride, B = stride_units * STRIDE_ALIGN, B_units * ALIGN
    first, split = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    k = first + row
    start = split * blocks * BLOCK
    offsets = row[:, None] * stride + column[None, :]
    v_ptr += first * stride
    w_ptr += first * stride
    if HELD:
        inside = (k < K)[:, None] & (column < B)[None, :]
        v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(wide)
        squares = tl.sum(v * v, 1)
    elif PHASE != APPLY:
        total = tl.zeros((ROWS, BLOCK), wide)
        for i in range(blocks):
            c = start + i * BLOCK
            x = _load(v_ptr + c, offsets, (c + column < B)[None, :], c + BLOCK <= B, wide)
            total += x * x
        squares = tl.sum(total, 1)
        if PHASE == SUM:
            tl.store(partial_ptr + k * SPLITS + split, squares)
    else:
        merge = tl.arange(0, SPLITS)
        parts = tl.load(
            partial_ptr + k[:, None] * SPLITS + merge[None, :],
            mask=(merge < splits)[None, :],
            other=0.0,
        )
        squares = tl.sum(parts, 1)
    if PHASE != SUM:
        norm = tl.where(k < K, root(squares), 1.0)
        if split == 0:
            tl.store(norm_ptr + k, norm, mask=k < K)
        scale = divide(tl.load(g_ptr + k, mask=k < K, other=0.0).to(wide), length_of(norm, EPS))
        if HELD:
            tl.store(w_ptr + offsets, (v * scale[:, None]).to(w_ptr.dtype.element_ty), mask=inside)
        else:
            for i in range(blocks):
                c = start + i * BLOCK
                mask = (c + column < B)[None, :]
                x = _load(v_ptr + c, offsets, mask, c + BLOCK <= B, wide)
                _store(w_ptr + c, offsets, x * scale[:, None], mask, c + BLOCK <= B)


@triton.jit(do_not_specialize=["K", "stride_units", "B_units", "blocks", "splits"])
def rows_backward_kernel(
    dv_ptr,  # [K, B]
    dg_ptr,  # [K]
    partial_ptr,  # [K, SPLITS]
    v_ptr,  # [K, B]
    g_ptr,  # [K]
    norm_ptr,  # [K]
    dw_ptr,  # [K, B]
    K,
    stride_units,
    B_units,
    blocks,
    splits,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,
    PHASE: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    NEEDS_DG: tl.constexpr,
):
    wide: tl.constexpr = norm_ptr.dtype.element_ty
    stride, B = stride_units * STRIDE_ALIGN, B_units * ALIGN
    first, split = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    k = first + row
    start = split * blocks * BLOCK
    offsets = row[:, None] * stride + column[None, :]
    v_ptr += first * stride
    dw_ptr += first * stride
    if HELD:
        inside = (k < K)[:, None] & (column < B)[None, :]
        v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(wide)
        dw = tl.load(dw_ptr + offsets, mask=inside, other=0.0).to(wide)
        dot = tl.sum(v * dw, 1)
    elif PHASE != APPLY:
        total = tl.zeros((ROWS, BLOCK), wide)
        for i in range(blocks):
            c = start + i * BLOCK
            mask = (c + column < B)[None, :]
            x = _load(v_ptr + c, offsets, mask, c + BLOCK <= B, wide)
            total += x * _load(dw_ptr + c, offsets, mask, c + BLOCK <= B, wide)
        dot = tl.sum(total, 1)
        if PHASE == SUM:
            tl.store(partial_ptr + k * SPLITS + split, dot)
    else:
        merge = tl.arange(0, SPLITS)
        parts = tl.load(
            partial_ptr + k[:, None] * SPLITS + merge[None, :],
            mask=(merge < splits)[None, :],
            other=0.0,
        )
        dot = tl.sum(parts, 1)
    if PHASE != SUM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=1.0)
        length = length_of(norm, EPS)
        if NEEDS_DG:
            if split == 0:
                tl.store(dg_ptr + k, divide(dot, length).to(dg_ptr.dtype.element_ty), mask=k < K)
        if NEEDS_DV:
            dv_ptr += first * stride
            scale = divide(tl.load(g_ptr + k, mask=k < K, other=0.0).to(wide), length)[:, None]
            along = projection(dot, norm, length, EPS)[:, None]
            if HELD:
                tl.store(
                    dv_ptr + offsets,
                    (scale * (dw - along * v)).to(dv_ptr.dtype.element_ty),
                    mask=inside,
                )
            else:
                for i in range(blocks):
                    c = start + i * BLOCK
                    mask = (c + column < B)[None, :]
                    x = _load(v_ptr + c, offsets, mask, c + BLOCK <= B, wide)
                    dx = _load(dw_ptr + c, offsets, mask, c + BLOCK <= B, wide)
                    _store(dv_ptr + c, offsets, scale * (dx - along * x), mask, c + BLOCK <= B)
