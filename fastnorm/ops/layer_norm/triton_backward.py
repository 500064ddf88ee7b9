"""Layer norm backward in Triton: x and dy are read once, parameter gradients are summed on the way,
in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.layer_norm.triton_tiles import read, tile_pointers, two_sums

SIZES = [
    "B",
    "S",
    "N",
    "tiles",
    "x_batch",
    "x_row",
    "x_col",
    "dy_batch",
    "dy_row",
    "dy_col",
    "programs",
]

# pieces of kernels


@triton.jit
def column(ptr, col, inside, missing: tl.constexpr, WIDE: tl.constexpr):
    """One parameter per column as [1, COLS]; a number where there is none."""
    if ptr is None:
        return tl.full((1, 1), missing, WIDE)
    else:
        return read(ptr + col, inside).to(WIDE)[None, :]


@triton.jit
def within(row_inside, col_inside):
    """The mask of a tile; col_inside is None where every column is inside."""
    if col_inside is None:
        return row_inside[:, None]
    else:
        return row_inside[:, None] & col_inside[None, :]


@triton.jit
def place(tile, tiles, ROWS: tl.constexpr, BATCHED: tl.constexpr):
    """The batch of a tile, and its first row there: a division only where there are batches."""
    if BATCHED:
        return (tile // tiles).to(tl.int64), (tile % tiles).to(tl.int64) * ROWS
    else:
        return tl.full((), 0, tl.int64), tl.full((), ROWS, tl.int64) * tile


@triton.jit
def read_rows(
    x_ptr, dy_ptr, mean_ptr, rstd_ptr, tile, tiles, row, col, col_inside, B, S,
    x_batch, x_row, x_col, dy_batch, dy_row, dy_col,
    ROWS: tl.constexpr, X_TRANSPOSED: tl.constexpr, DY_TRANSPOSED: tl.constexpr,
    BATCHED: tl.constexpr,
):  # fmt: skip
    """x and dy of a tile of rows, mean and rstd of its rows: zeros beyond the last."""
    batch, first = place(tile, tiles, ROWS, BATCHED)
    row_inside = first + row < tl.where(tile < B * tiles, S, 0)
    inside = within(row_inside, col_inside)
    x_at = tile_pointers(x_ptr, batch, first, row, col, x_batch, x_row, x_col, ROWS, X_TRANSPOSED)
    dy_at = tile_pointers(
        dy_ptr, batch, first, row, col, dy_batch, dy_row, dy_col, ROWS, DY_TRANSPOSED
    )
    r = batch * S + first + row
    return (
        tl.load(x_at, mask=inside, other=0.0),
        tl.load(dy_at, mask=inside, other=0.0),
        tl.load(mean_ptr + r, mask=row_inside, other=0.0),
        tl.load(rstd_ptr + r, mask=row_inside, other=0.0),
    )


@triton.jit
def store_partial(ptr, part, N, col, sums):
    """One row of partial parameter gradients, at columns `col`."""
    if ptr is not None:
        tl.store(ptr + part.to(tl.int64) * N + col, tl.sum(sums, axis=0), mask=col < N)


@triton.jit
def sum_parts(
    out_ptr, part_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):
    if out_ptr is not None:
        col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = tl.zeros((BLOCK_P, BLOCK_N), WIDE)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            inside = (p < P)[:, None] & (col < N)[None, :]
            sums += tl.load(
                part_ptr + p[:, None].to(tl.int64) * N + col[None, :], mask=inside, other=0.0
            )
        tl.store(out_ptr + col, tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty), mask=col < N)


# kernels


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def backward_kernel(
    dx_ptr,  # [B, S, N] or None
    dweight_ptr,  # [programs, N] or None
    dbias_ptr,  # [programs, N] or None
    x_ptr,  # [B, S, N], strides x_*
    dy_ptr,  # [B, S, N], strides dy_*
    dsum_ptr,  # [B, S, N] or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    mean_ptr,  # [B * S]
    rstd_ptr,  # [B * S]
    B,
    S,
    N,
    tiles,  # per batch
    x_batch,
    x_row,
    x_col,
    dy_batch,
    dy_row,
    dy_col,
    programs,
    ROW_ALIGN: tl.constexpr,
    COL_ALIGN: tl.constexpr,
    X_TRANSPOSED: tl.constexpr,
    DY_TRANSPOSED: tl.constexpr,
    BATCHED: tl.constexpr,
    HOLD: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Persistent over strided tiles of whole rows in registers; parameter gradients stay in
    registers to the end."""
    X_ALIGN: tl.constexpr = ROW_ALIGN if X_TRANSPOSED else COL_ALIGN
    DY_ALIGN: tl.constexpr = ROW_ALIGN if DY_TRANSPOSED else COL_ALIGN
    S = S * ROW_ALIGN
    N = COLS if WHOLE else N * COL_ALIGN
    x_batch, x_row, x_col = x_batch * X_ALIGN, x_row * COL_ALIGN, x_col * ROW_ALIGN
    dy_batch, dy_row, dy_col = dy_batch * DY_ALIGN, dy_row * COL_ALIGN, dy_col * ROW_ALIGN
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    col_inside = None if WHOLE else col < N
    share = 1.0 / COLS if WHOLE else 1.0 / N.to(WIDE)
    dweight = tl.zeros((ROWS, COLS), WIDE)
    dbias = tl.zeros((ROWS, COLS), WIDE)
    x, dy, mean, rstd = read_rows(
        x_ptr, dy_ptr, mean_ptr, rstd_ptr, tl.program_id(0), tiles, row, col, col_inside, B, S,
        x_batch, x_row, x_col, dy_batch, dy_row, dy_col, ROWS, X_TRANSPOSED, DY_TRANSPOSED,
        BATCHED,
    )  # fmt: skip
    if HOLD:
        weight = column(weight_ptr, col, col_inside, 1.0, WIDE)
        if SLOPE is not None:
            bias = column(bias_ptr, col, col_inside, 0.0, WIDE)
    for tile in range(tl.program_id(0), B * tiles, programs):
        done_batch, done_first = place(tile, tiles, ROWS, BATCHED)
        here = within(done_first + row < S, col_inside)
        x_hat = (x.to(WIDE) - mean[:, None]) * rstd[:, None]
        if not WHOLE:
            x_hat = tl.where(here, x_hat, 0.0)
        dz = dy.to(WIDE)
        scale = rstd
        # the next rows are under way while these are worked on
        x, dy, mean, rstd = read_rows(
            x_ptr, dy_ptr, mean_ptr, rstd_ptr, tile + programs, tiles, row, col, col_inside, B, S,
            x_batch, x_row, x_col, dy_batch, dy_row, dy_col, ROWS, X_TRANSPOSED, DY_TRANSPOSED,
            BATCHED,
        )  # fmt: skip
        if not HOLD:  # registers are for the gradients, parameters come from L1 again
            weight = column(weight_ptr, col, col_inside, 1.0, WIDE)
            if SLOPE is not None:
                bias = column(bias_ptr, col, col_inside, 0.0, WIDE)
        if SLOPE is not None:
            dz = dz * SLOPE(x_hat * weight + bias)
        if dweight_ptr is not None:
            dweight += dz * x_hat
        if dbias_ptr is not None:
            dbias += dz
        if dx_ptr is not None:
            g = dz * weight
            m1, m2 = two_sums(g, g * x_hat)
            m1, m2 = scale * (m1 * share), scale * (m2 * share)
            dx = g * scale[:, None] - m1[:, None] - x_hat * m2[:, None]
            if dsum_ptr is not None:
                dsum_at = tile_pointers(
                    dsum_ptr, done_batch, done_first, row, col, S.to(tl.int64) * N, N, 1, ROWS,
                    False,
                )  # fmt: skip
                dx += tl.load(dsum_at, mask=here, other=0.0).to(WIDE)
            dx_at = tile_pointers(
                dx_ptr, done_batch, done_first, row, col, S.to(tl.int64) * N, N, 1, ROWS, False
            )
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=here)
    store_partial(dweight_ptr, tl.program_id(0), N, col, dweight)
    store_partial(dbias_ptr, tl.program_id(0), N, col, dbias)


@triton.jit(do_not_specialize=["P", "N"])
def finalize_kernel(
    dweight_ptr,  # [N] or None
    dbias_ptr,  # [N] or None
    dweight_part_ptr,  # [P, N] or None
    dbias_part_ptr,  # [P, N] or None
    P,
    N,
    COL_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sum the partial parameter gradients of all programs, in fixed order, and cast: one grid
    column per parameter."""
    N = N * COL_ALIGN
    if dweight_ptr is None:
        sum_parts(dbias_ptr, dbias_part_ptr, P, N, BLOCK_P, BLOCK_N, WIDE)
    else:
        if tl.program_id(1) == 0:
            sum_parts(dweight_ptr, dweight_part_ptr, P, N, BLOCK_P, BLOCK_N, WIDE)
        else:
            sum_parts(dbias_ptr, dbias_part_ptr, P, N, BLOCK_P, BLOCK_N, WIDE)
