"""Layer norm backward for rows that do not fit registers: column chunks, in ticket order."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.layer_norm.triton_backward import column, store_partial
from fastnorm.ops.layer_norm.triton_tiles import leave_zero, two_sums

LONG_SIZES = [
    "M",
    "N",
    "x_row",
    "dy_row",
    "dsum_row",
    "chunks",
    "groups",
    "group_rows",
    "lanes",
    "lead",
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
        # here, from L1: registers are for the rows
        weight = column(weight_ptr, begin + col, col_inside, 1.0, WIDE)
        if SLOPE is not None:
            bias = column(bias_ptr, begin + col, col_inside, 0.0, WIDE)
            dz = dz * SLOPE(x_hat * weight + bias)
        g = dz * weight
        m1, m2 = two_sums(g, g * x_hat)
        at = partial_ptr + (r * chunks + chunk) * 2
        tl.store(at, m1, mask=row_inside)
        tl.store(at + 1, m2, mask=row_inside)


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
        total_1, total_2 = two_sums(m1, m2)
        tl.store(total_ptr + r * 2, total_1 / N.to(WIDE), mask=row_inside)
        tl.store(total_ptr + r * 2 + 1, total_2 / N.to(WIDE), mask=row_inside)


@triton.jit
def first_phase(
    partial_ptr, total_ptr, counters_ptr, x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    tile, M, group_rows, x_row, dy_row, N, chunks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SLOPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The row sums of one tile; the last of a group merges its parts and says so: chunks + 1
    arrivals."""
    group = tile // chunks
    chunk = tile % chunks
    first = group.to(tl.int64) * group_rows
    rows = tl.minimum(M - first, group_rows).to(tl.int32)
    row_sums(
        partial_ptr, x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
        first, rows, x_row, dy_row, chunk.to(tl.int64) * BLOCK, N, chunk, chunks,
        ROWS, BLOCK, SLOPE, WIDE,
    )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + 2 + group, 1, sem="acq_rel") == chunks - 1:
        merge_row_sums(total_ptr, partial_ptr, first, rows, chunks, N, ROWS, PARTS, WIDE)
        tl.debug_barrier()
        tl.atomic_add(counters_ptr + 2 + group, 1, sem="release")


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
        # read for the last time, and written: L2 is for what the first phase has read
        x_at = x_ptr + r[:, None] * x_row + begin + col[None, :]
        x = tl.load(x_at, mask=inside, other=0.0, eviction_policy="evict_first").to(WIDE)
        dy_at = dy_ptr + r[:, None] * dy_row + begin + col[None, :]
        dz = tl.load(dy_at, mask=inside, other=0.0, eviction_policy="evict_first").to(WIDE)
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
            dx = dz * weight * rstd - rstd * m1 - x_hat * (rstd * m2)
            at = r[:, None] * N + begin + col[None, :]
            if dsum_ptr is not None:
                dsum = tl.load(dsum_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
                dx += dsum.to(WIDE)
            tl.store(
                dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside,
                eviction_policy="evict_first",
            )  # fmt: skip
    return dweight, dbias


@triton.jit(do_not_specialize=LONG_SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def backward_ticket_kernel(
    dx_ptr,  # [M, N] or None
    dweight_ptr,  # [lanes, N] or None
    dbias_ptr,  # [lanes, N] or None
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
    group_rows,
    lanes,
    lead,
    COL_ALIGN: tl.constexpr,
    ROWS_SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows too long for registers: tiles are a chunk of the columns of a group of rows.

    First phase: a tile gives its part of the row sums, the group's last arrival merges them.
        Tickets give these tiles to any program.
    Second phase: dx and the parameter gradients, which stay in registers: a program has one chunk,
        of every lanes-th group. x and dy come from L2 where the first phase is not too far ahead.
    Before each tile of the second phase a program takes a ticket, then more until every tile of the
    group's first phase is taken; who took one is running and waits for nothing before it has done
    it: no deadlock on any grid.
    """
    N = N * COL_ALIGN
    x_row = (x_row * COL_ALIGN).to(tl.int64)
    dy_row = (dy_row * COL_ALIGN).to(tl.int64)
    lane = tl.program_id(0) // chunks
    # backwards: the end of a first phase too large for L2 is what L2 still holds
    begin = (chunks - 1 - tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    col = tl.arange(0, BLOCK)
    dweight = tl.zeros((ROWS, BLOCK), WIDE)
    dbias = tl.zeros((ROWS, BLOCK), WIDE)
    ticket = -1
    due = tl.where(tl.program_id(0) < lead, 2, 1)
    first = lane.to(tl.int64) * group_rows
    for group in range(lane, groups, lanes):
        if dx_ptr is not None:
            while (due > 0) | (ticket < (group + 1) * chunks - 1):
                ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
                due -= 1
                if ticket < groups * chunks:
                    first_phase(
                        partial_ptr, total_ptr, counters_ptr, x_ptr, dy_ptr, weight_ptr, bias_ptr,
                        mean_ptr, rstd_ptr, ticket, M, group_rows, x_row, dy_row, N, chunks,
                        ROWS_SUMMED, BLOCK, PARTS, SLOPE, WIDE,
                    )  # fmt: skip
            due = 1
            while tl.atomic_add(counters_ptr + 2 + group, 0, sem="acquire") <= chunks:
                pass
        # here, so that the first phase has its registers
        weight = column(weight_ptr, begin + col, begin + col < N, 1.0, WIDE)
        rows = tl.minimum(M - first, group_rows).to(tl.int32)
        dweight, dbias = backward_rows(
            dx_ptr, total_ptr, x_ptr, dy_ptr, dsum_ptr, bias_ptr, mean_ptr, rstd_ptr,
            weight, dweight, dbias,
            first, rows, x_row, dy_row, begin, N, dweight_ptr is not None, dbias_ptr is not None,
            ROWS, BLOCK, SLOPE, WIDE,
        )  # fmt: skip
        first += lanes.to(tl.int64) * group_rows
    store_partial(dweight_ptr, lane, N, begin + col, dweight)
    store_partial(dbias_ptr, lane, N, begin + col, dbias)
    leave_zero(counters_ptr, groups + 2, lanes * chunks, 256)
