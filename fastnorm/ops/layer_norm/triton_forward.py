"""Layer norm forward in Triton: rows in registers, long rows in two sweeps, very long rows by many
programs each."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.layer_norm.triton_tiles import (
    added,
    affine,
    inverse_root,
    leave_zero,
    quotient,
    tile_pointers,
)

# Sizes and strides come in units of COL_ALIGN (ROW_ALIGN) elements: Triton knows of an int argument
# at most that 16 divides it, and a 16-byte access needs 4 (fp32) or 8 (16 bit). None of them is
# specialised: no batch size recompiles.
SIZES = ["S", "N", "tiles", "x_batch", "x_row", "x_col", "residual_batch", "residual_row"]
LONG_SIZES = ["M", "N", "x_row", "residual_row", "chunks", "blocks", "lag", "programs"]


@triton.jit
def chunk_statistics(x_ptr, residual_ptr, sum_ptr, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Mean and sum of squared deviations of `length` adjacent elements: Welford in every lane,
    lanes merged by Chan."""
    lane = tl.arange(0, BLOCK)
    full = length // BLOCK
    mean = tl.zeros((BLOCK,), WIDE)
    m2 = tl.zeros((BLOCK,), WIDE)
    seen = tl.full((), 0.0, WIDE)
    offset = tl.full((), 0, tl.int64)
    for _ in range(0, full):  # whole blocks without a mask, so that a ragged end costs them nothing
        at = offset + lane
        v = added(tl.load(x_ptr + at), residual_ptr, at, None, WIDE)
        if sum_ptr is not None:
            tl.store(sum_ptr + at, v)
        v = v.to(WIDE)
        seen += 1.0
        delta = v - mean
        mean += delta * (1.0 / seen)
        m2 += delta * (v - mean)
        offset += BLOCK
    at = offset + lane
    inside = at < length
    v = added(tl.load(x_ptr + at, mask=inside, other=0.0), residual_ptr, at, inside, WIDE)
    if sum_ptr is not None:
        tl.store(sum_ptr + at, v, mask=inside)
    delta = v.to(WIDE) - mean
    mean += tl.where(inside, delta / (seen + 1.0), 0.0)
    m2 += tl.where(inside, delta * (v.to(WIDE) - mean), 0.0)
    count = seen + inside.to(WIDE)
    # the lanes' means are summed as differences from one of about their size: at mean 1e4 their sum
    # would lose digits
    used = count > 0
    pivot = tl.sum(tl.where(used, mean, 0.0)) / tl.sum(used.to(WIDE))
    whole = pivot + tl.sum((mean - pivot) * count) / length.to(WIDE)
    return whole, tl.sum(m2 + count * (mean - whole) * (mean - whole))


@triton.jit
def normalize_block(
    y_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    at,
    inside,
    mean,
    rstd,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    if inside is None:
        v = tl.load(x_ptr + at, eviction_policy="evict_first")
    else:
        v = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    x_hat = (added(v, residual_ptr, at, inside, WIDE).to(WIDE) - mean) * rstd
    z = affine(x_hat, weight_ptr, bias_ptr, at, inside, WIDE)
    tl.store(
        y_ptr + at, VALUE(z).to(y_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first"
    )


@triton.jit
def normalize_chunk(
    y_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean, rstd, length,
    BLOCK: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Normalise `length` adjacent elements, backwards: the end of the sweep before is what the
    caches still hold."""
    lane = tl.arange(0, BLOCK)
    full = length // BLOCK
    offset = full.to(tl.int64) * BLOCK
    at = offset + lane
    normalize_block(
        y_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, at, at < length, mean, rstd, VALUE, WIDE
    )
    for _ in range(0, full):
        offset -= BLOCK
        at = offset + lane
        normalize_block(
            y_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, at, None, mean, rstd, VALUE, WIDE
        )


@triton.jit
def merge_chunks(partial_ptr, chunks, chunk, N, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """Chan's merge of the (mean, m2) of a row's chunks, always in the same order."""
    part = tl.arange(0, PARTS)
    pivot = tl.load(partial_ptr)
    total = tl.zeros((PARTS,), WIDE)
    for start in range(0, chunks, PARTS):
        k = start + part
        count = tl.minimum(N - k.to(tl.int64) * chunk, chunk).to(WIDE)
        delta = tl.load(partial_ptr + k * 2, mask=k < chunks, other=0.0) - pivot
        total += tl.where(k < chunks, delta * count, 0.0)
    mean = pivot + tl.sum(total) / N.to(WIDE)
    m2 = tl.zeros((PARTS,), WIDE)
    for start in range(0, chunks, PARTS):
        k = start + part
        count = tl.minimum(N - k.to(tl.int64) * chunk, chunk).to(WIDE)
        delta = tl.load(partial_ptr + k * 2, mask=k < chunks, other=0.0) - mean
        within = tl.load(partial_ptr + k * 2 + 1, mask=k < chunks, other=0.0)
        m2 += tl.where(k < chunks, within + count * delta * delta, 0.0)
    return mean, tl.sum(m2)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def normalize_kernel(
    y_ptr,  # [B, S, N]
    sum_ptr,  # [B, S, N] or None
    mean_ptr,  # [B * S]
    rstd_ptr,  # [B * S]
    x_ptr,  # [B, S, N], strides x_*
    residual_ptr,  # [B, S, N], columns adjacent, or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    eps,
    eps_low,
    S,
    N,
    tiles,  # per batch
    x_batch,
    x_row,
    x_col,
    residual_batch,
    residual_row,
    ROW_ALIGN: tl.constexpr,
    COL_ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """ROWS whole rows per program, in registers: x is read once, y written once."""
    STRIDE_ALIGN: tl.constexpr = ROW_ALIGN if TRANSPOSED else COL_ALIGN
    S = S * ROW_ALIGN
    N = N * COL_ALIGN
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    row_inside = first + row < S
    inside = row_inside[:, None] & (col < N)[None, :]
    x_ptr = tile_pointers(
        x_ptr,
        batch,
        first,
        row,
        col,
        x_batch * STRIDE_ALIGN,
        x_row * COL_ALIGN,
        x_col * ROW_ALIGN,
        ROWS,
        TRANSPOSED,
    )
    v = tl.load(x_ptr, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual_ptr = tile_pointers(
            residual_ptr,
            batch,
            first,
            row,
            col,
            residual_batch * COL_ALIGN,
            residual_row * COL_ALIGN,
            1,
            ROWS,
            False,
        )
        v = added(v, residual_ptr, 0, inside, WIDE)
        if sum_ptr is not None:
            tl.store(
                tile_pointers(
                    sum_ptr, batch, first, row, col, S.to(tl.int64) * N, N, 1, ROWS, False
                ),
                v,
                mask=inside,
            )
    v = v.to(WIDE)
    n = N.to(WIDE)
    share = 1.0 / n
    mean = quotient(tl.sum(v, axis=1), n, share)
    # masked lanes hold 0, not the mean: without the second where, rows of 769 at mean 1000 get a
    # wrong variance
    centred = tl.where(inside, v - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) * share
    rstd = inverse_root(
        variance, eps, eps_low, x_ptr.dtype.element_ty.primitive_bitwidth == 16, WIDE
    )
    tl.store(mean_ptr + batch * S + first + row, mean, mask=row_inside)
    tl.store(rstd_ptr + batch * S + first + row, rstd, mask=row_inside)
    col_inside = (col < N)[None, :]
    at = col[None, :]
    z = affine(centred * rstd[:, None], weight_ptr, bias_ptr, at, col_inside, WIDE)
    y = VALUE(z).to(y_ptr.dtype.element_ty)
    tl.store(
        tile_pointers(y_ptr, batch, first, row, col, S.to(tl.int64) * N, N, 1, ROWS, False),
        y,
        mask=inside,
    )


@triton.jit(do_not_specialize=LONG_SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def normalize_long_kernel(
    y_ptr,  # [M, N]
    sum_ptr,  # [M, N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    x_ptr,  # [M, N], rows x_row apart
    residual_ptr,  # [M, N], rows residual_row apart, or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    eps,
    eps_low,
    N,
    x_row,
    residual_row,
    COL_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One row of any length per program: a sweep for the statistics, a second one backwards."""
    row = tl.program_id(0).to(tl.int64)
    N = N * COL_ALIGN
    x_ptr += row * (x_row * COL_ALIGN)
    residual_ptr = None if residual_ptr is None else residual_ptr + row * (residual_row * COL_ALIGN)
    mean, m2 = chunk_statistics(
        x_ptr, residual_ptr, None if sum_ptr is None else sum_ptr + row * N, N, BLOCK, WIDE
    )
    rstd = inverse_root(m2 / N.to(WIDE), eps, eps_low, False, WIDE)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    normalize_chunk(
        y_ptr + row * N,
        x_ptr,
        residual_ptr,
        weight_ptr,
        bias_ptr,
        mean,
        rstd,
        N,
        BLOCK,
        VALUE,
        WIDE,
    )


@triton.jit(do_not_specialize=LONG_SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def normalize_ticket_kernel(
    y_ptr,  # [M, N]
    sum_ptr,  # [M, N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    x_ptr,  # [M, N], rows x_row apart
    residual_ptr,  # [M, N], rows residual_row apart, or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    partial_ptr,  # [M, chunks, 2]: mean and m2
    counters_ptr,  # [2 + M]: tickets, programs done, arrivals per row
    eps,
    eps_low,
    M,
    N,
    x_row,
    residual_row,
    chunks,
    blocks,  # of a chunk
    lag,
    programs,
    COL_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows shared by many programs: ticket 2k takes the statistics of chunk k, ticket 2k + 1
    normalises chunk k - lag.

    lag >= chunks - 1, so a program waits for smaller tickets alone, which are running or done: no
    deadlock on any grid. The second read of x comes lag chunks after the first and finds it in L2.
    """
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    statistics = ticket % 2 == 0
    tile = tl.where(statistics, ticket // 2, ticket // 2 - lag)
    N = N * COL_ALIGN
    if (tile >= 0) & (tile < M * chunks):
        row = (tile // chunks).to(tl.int64)
        chunk = blocks * BLOCK
        begin = (tile % chunks).to(tl.int64) * chunk
        length = tl.minimum(N - begin, chunk)
        x_ptr += row * (x_row * COL_ALIGN) + begin
        residual_at = row * (residual_row * COL_ALIGN) + begin
        # a name of its own: Triton 3.6 cannot make a parameter that is None another in a branch
        residual_row_ptr = None if residual_ptr is None else residual_ptr + residual_at
        arrivals_ptr = counters_ptr + 2 + row
        if statistics:
            sum_row_ptr = None if sum_ptr is None else sum_ptr + row * N + begin
            mean, m2 = chunk_statistics(x_ptr, residual_row_ptr, sum_row_ptr, length, BLOCK, WIDE)
            tl.store(partial_ptr + tile.to(tl.int64) * 2, mean)
            tl.store(partial_ptr + tile.to(tl.int64) * 2 + 1, m2)
            tl.debug_barrier()
            if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == chunks - 1:
                mean, m2 = merge_chunks(
                    partial_ptr + row * chunks * 2, chunks, chunk, N, PARTS, WIDE
                )
                tl.store(mean_ptr + row, mean)
                rstd = inverse_root(m2 / N.to(WIDE), eps, eps_low, False, WIDE)
                tl.store(rstd_ptr + row, rstd)
                tl.debug_barrier()
                tl.atomic_add(arrivals_ptr, 1, sem="release")
        else:
            while tl.atomic_add(arrivals_ptr, 0, sem="acquire") <= chunks:
                pass
            mean = tl.load(mean_ptr + row)
            rstd = tl.load(rstd_ptr + row)
            normalize_chunk(
                y_ptr + row * N + begin, x_ptr, residual_row_ptr,
                None if weight_ptr is None else weight_ptr + begin,
                None if bias_ptr is None else bias_ptr + begin,
                mean, rstd, length, BLOCK, VALUE, WIDE,
            )  # fmt: skip
    leave_zero(counters_ptr, M + 2, programs, 256)
