"""Layer norm backward for rows that do not fit registers: column chunks, in ticket order."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.layer_norm.triton_backward import column, store_partial
from fastnorm.ops.layer_norm.triton_tiles import leave_zero

LONG_SIZES = [
    "M",
    "N",
    "x_row",
    "dy_row",
    "dsum_row",
    "chunks",
    "groups",
    "span",
    "lag",
    "programs",
]


@triton.jit
def row_sums(
    partial_ptr, x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    first, rows, x_row, dy_row, begin, N, chunk, chunks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The part of one column chunk in sum(g) and sum(g * x_hat) of `rows` rows."""
    col = tl.arange(0, BLOCK)
    col_inside = begin + col < N
    weight = column(weight_ptr, begin + col, col_inside, 1.0, WIDE)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        row_inside = row < rows
        inside = row_inside[:, None] & col_inside[None, :]
        r = first + row
        x = tl.load(x_ptr + r[:, None] * x_row + begin + col[None, :], mask=inside, other=0.0).to(
            WIDE
        )
        dz = tl.load(
            dy_ptr + r[:, None] * dy_row + begin + col[None, :], mask=inside, other=0.0
        ).to(WIDE)
        mean = tl.load(mean_ptr + r, mask=row_inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=row_inside, other=0.0)[:, None]
        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        if SLOPE is not None:
            bias = column(bias_ptr, begin + col, col_inside, 0.0, WIDE)
            dz = dz * SLOPE(x_hat * weight + bias)
        g = dz * weight
        at = partial_ptr + (r * chunks + chunk) * 2
        tl.store(at, tl.sum(g, axis=1), mask=row_inside)
        tl.store(at + 1, tl.sum(g * x_hat, axis=1), mask=row_inside)


@triton.jit
def merge_row_sums(
    total_ptr,
    partial_ptr,
    first,
    rows,
    chunks,
    N,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Means of g and g * x_hat of `rows` rows from the parts of all chunks, always in the same
    order."""
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        row_inside = row < rows
        r = first + row
        m1 = tl.zeros((ROWS, PARTS), WIDE)
        m2 = tl.zeros((ROWS, PARTS), WIDE)
        for k in range(0, chunks, PARTS):
            part = k + tl.arange(0, PARTS)
            inside = row_inside[:, None] & (part < chunks)[None, :]
            at = partial_ptr + (r[:, None] * chunks + part[None, :]) * 2
            m1 += tl.load(at, mask=inside, other=0.0)
            m2 += tl.load(at + 1, mask=inside, other=0.0)
        tl.store(total_ptr + r * 2, tl.sum(m1, axis=1) / N.to(WIDE), mask=row_inside)
        tl.store(total_ptr + r * 2 + 1, tl.sum(m2, axis=1) / N.to(WIDE), mask=row_inside)


@triton.jit
def backward_rows(
    dx_ptr, total_ptr, x_ptr, dy_ptr, dsum_ptr, bias_ptr, mean_ptr, rstd_ptr, weight, dweight,
    dbias,
    first, rows, x_row, dy_row, begin, N,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx of one column chunk of `rows` rows; returns the parameter gradients with theirs added."""
    col = tl.arange(0, BLOCK)
    col_inside = begin + col < N
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        row_inside = row < rows
        inside = row_inside[:, None] & col_inside[None, :]
        r = first + row
        x = tl.load(x_ptr + r[:, None] * x_row + begin + col[None, :], mask=inside, other=0.0).to(
            WIDE
        )
        dz = tl.load(
            dy_ptr + r[:, None] * dy_row + begin + col[None, :], mask=inside, other=0.0
        ).to(WIDE)
        mean = tl.load(mean_ptr + r, mask=row_inside, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + r, mask=row_inside, other=0.0)[:, None]
        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        if SLOPE is not None:
            bias = column(bias_ptr, begin + col, col_inside, 0.0, WIDE)
            dz = dz * SLOPE(x_hat * weight + bias)
        if NEEDS_WEIGHT:
            dweight += dz * x_hat
        if NEEDS_BIAS:
            dbias += dz
        if dx_ptr is not None:
            m1 = tl.load(total_ptr + r * 2, mask=row_inside, other=0.0)[:, None]
            m2 = tl.load(total_ptr + r * 2 + 1, mask=row_inside, other=0.0)[:, None]
            dx = rstd * (dz * weight - m1 - x_hat * m2)
            at = r[:, None] * N + begin + col[None, :]
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(WIDE)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    return dweight, dbias


@triton.jit(do_not_specialize=LONG_SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def backward_ticket_kernel(
    dx_ptr,  # [M, N] or None
    dweight_ptr,  # [spans, N] or None
    dbias_ptr,  # [spans, N] or None
    x_ptr,  # [M, N], rows x_row apart
    dy_ptr,  # [M, N], rows dy_row apart
    dsum_ptr,  # [M, N] or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    partial_ptr,  # [M, chunks, 2]: parts of sum(g) and sum(g * x_hat)
    total_ptr,  # [M, 2]: their means
    counters_ptr,  # [2 + groups]: tickets, programs done, arrivals per group of rows
    M,
    N,
    x_row,
    dy_row,
    chunks,
    groups,
    span,  # groups in one tile of the second phase: 1, or all
    lag,
    programs,
    COL_ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows too long for registers: columns in chunks, tickets as in the forward.

    First phase: a chunk of a group of rows gives its part of the row sums, the group's last arrival
        merges them.
    Second phase: the chunk again (from L2, `lag` tiles later), dx and the parameter gradients.
    Where a group alone is too large for L2 the second phase starts after the whole first, and a
    tile covers every row of its columns.
    """
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    N = N * COL_ALIGN
    x_row = (x_row * COL_ALIGN).to(tl.int64)
    dy_row = (dy_row * COL_ALIGN).to(tl.int64)
    first_phase = tl.where(span == 1, ticket % 2 == 0, ticket < groups * chunks)
    tile = tl.where(span == 1, ticket // 2, ticket)
    tile = tl.where(first_phase, tile, tl.where(span == 1, tile - lag, tile - groups * chunks))
    group = tile // chunks
    chunk = tile % chunks
    begin = chunk.to(tl.int64) * BLOCK
    if (tile >= 0) & (group < tl.where(first_phase, groups, groups // span)):
        if first_phase:
            if dx_ptr is not None:
                first = group.to(tl.int64) * GROUP
                rows = tl.minimum(M - first, GROUP).to(tl.int32)
                row_sums(
                    partial_ptr, x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
                    first, rows, x_row, dy_row, begin, N, chunk, chunks, ROWS, BLOCK, SLOPE, WIDE,
                )  # fmt: skip
                tl.debug_barrier()
                if tl.atomic_add(counters_ptr + 2 + group, 1, sem="acq_rel") == chunks - 1:
                    merge_row_sums(
                        total_ptr, partial_ptr, first, rows, chunks, N, ROWS, PARTS, WIDE
                    )
                    tl.debug_barrier()
                    tl.atomic_add(counters_ptr + 2 + group, 1, sem="release")
        else:
            col = tl.arange(0, BLOCK)
            weight = column(weight_ptr, begin + col, begin + col < N, 1.0, WIDE)
            dweight = tl.zeros((ROWS, BLOCK), WIDE)
            dbias = tl.zeros((ROWS, BLOCK), WIDE)
            first = group.to(tl.int64) * span * GROUP
            for g in range(group * span, (group + 1) * span):
                if dx_ptr is not None:
                    while tl.atomic_add(counters_ptr + 2 + g, 0, sem="acquire") <= chunks:
                        pass
                rows = tl.minimum(M - first, GROUP).to(tl.int32)
                dweight, dbias = backward_rows(
                    dx_ptr, total_ptr, x_ptr, dy_ptr, dsum_ptr, bias_ptr, mean_ptr, rstd_ptr,
                    weight, dweight, dbias,
                    first, rows, x_row, dy_row, begin, N, dweight_ptr is not None,
                    dbias_ptr is not None,
                    ROWS, BLOCK, SLOPE, WIDE,
                )  # fmt: skip
                first += GROUP
            store_partial(dweight_ptr, group, N, begin + col, dweight)
            store_partial(dbias_ptr, group, N, begin + col, dbias)
    leave_zero(counters_ptr, groups + 2, programs, 256)
