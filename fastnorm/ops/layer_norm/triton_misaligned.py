"""Layer norm in Triton where N is no multiple of a 16-byte access, in 16-bit numbers: 16 bytes at a
time nevertheless.

Of every PHASES-th row the first boundary of 16 bytes is at the same column, and a program works on
such rows alone. A row is whole vectors between boundaries, its body, and up to VEC - 1 elements
before and after it, its edges. Two tiles hold it: [ROWS, VECTORS, VEC] the body; [ROWS, VECTORS]
the edges, one element in each of the first 2 * VEC lanes, whose sums join those of the vectors.
Parameters are the same columns in every row of a program: they are read once, element by element,
and stay in registers.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastnorm.ops.layer_norm.triton_tiles import inverse_root, quotient

VEC = 8  # 16-bit numbers in 16 bytes
SIZES = ["M", "N", "phases", "tiles", "programs"]


def cut(M: int, N: int, thread: int, registers: int) -> tuple[dict[str, int], int, int]:
    """A tile with `thread` elements of bodies a thread, the phases of rows, how many tiles."""
    lanes = max(2 * VEC * VEC, triton.next_power_of_2(N // VEC * VEC))
    # a row is part of a warp or of a program all its own: several of several warps need barriers
    warps = 4 if lanes <= 32 * VEC else max(1, lanes // (32 * thread))
    rows = max(1, 32 * thread * warps // lanes)
    phases = VEC // math.gcd(N, VEC)
    tile = {"ROWS": rows, "VECTORS": lanes // VEC, "VEC": VEC}
    options = {"num_warps": warps, "maxnreg": min(registers, 2048 // warps)}  # what there is
    return {**tile, **options}, phases, triton.cdiv(M, phases * rows) * phases


@triton.jit
def columns(N, phase, VECTORS: tl.constexpr, VEC: tl.constexpr):
    """Of the rows of a phase: the column of the first boundary, those of the body and the edges,
    and which of them there are."""
    head = (VEC - phase * N % VEC) % VEC
    body = (N - head) // VEC * VEC
    lane = tl.arange(0, VECTORS)
    col = lane[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    edge = tl.where(lane < VEC, lane, head + body - VEC + lane)
    edge_inside = (lane < 2 * VEC) & (edge < tl.where(lane < VEC, head, N))
    col_inside = (lane * VEC < body)[None, :, None]
    return head, col, col_inside, edge[None, :], edge_inside[None, :]


@triton.jit
def rows_of(tile, phases, ROWS: tl.constexpr):
    """The rows of a tile: `phases` apart."""
    return tile + tile // phases * ((ROWS - 1) * phases) + phases * tl.arange(0, ROWS)


@triton.jit
def places(ptr, row, N, at, VEC: tl.constexpr):
    """Pointers to the body and to the edges of rows."""
    head, col, _, edge, _ = at
    start = row.to(tl.int64) * N
    # a multiple of VEC already; this tells the compiler
    boundary = (start + head) // VEC * VEC
    return ptr + boundary[:, None, None] + col, ptr + start[:, None] + edge


@triton.jit
def read_row(ptr, row, M, N, at, VEC: tl.constexpr):
    _, _, col_inside, _, edge_inside = at
    body_ptr, edge_ptr = places(ptr, row, N, at, VEC)
    there = row < M
    body = tl.load(body_ptr, mask=there[:, None, None] & col_inside, other=0.0)
    return body, tl.load(edge_ptr, mask=there[:, None] & edge_inside, other=0.0)


@triton.jit
def write_row(ptr, row, M, N, at, body, edge, VEC: tl.constexpr):
    _, _, col_inside, _, edge_inside = at
    body_ptr, edge_ptr = places(ptr, row, N, at, VEC)
    there = row < M
    tl.store(body_ptr, body.to(ptr.dtype.element_ty), mask=there[:, None, None] & col_inside)
    tl.store(edge_ptr, edge.to(ptr.dtype.element_ty), mask=there[:, None] & edge_inside)


@triton.jit
def parameter(ptr, at, missing: tl.constexpr, WIDE: tl.constexpr):
    """One parameter at the columns of the body and of the edges; a number where there is none."""
    if ptr is None:
        return tl.full((1, 1, 1), missing, WIDE), tl.full((1, 1), missing, WIDE)
    else:
        head, col, col_inside, edge, edge_inside = at
        return (
            tl.load(ptr + head + col, mask=col_inside, other=0.0).to(WIDE),
            tl.load(ptr + edge, mask=edge_inside, other=0.0).to(WIDE),
        )


@triton.jit
def store_sums(ptr, part, N, at, body, edge):
    """One row of partial parameter gradients."""
    if ptr is not None:
        head, col, col_inside, at_edge, edge_inside = at
        ptr += part.to(tl.int64) * N
        tl.store(ptr + head + col, tl.sum(body, axis=0, keep_dims=True), mask=col_inside)
        tl.store(ptr + at_edge, tl.sum(edge, axis=0, keep_dims=True), mask=edge_inside)


@triton.jit
def row_sum(body, edge):
    return tl.sum(tl.sum(body, axis=2) + edge, axis=1)


@triton.jit
def rounded_sum(x, residual, WIDE: tl.constexpr):
    return (x.to(WIDE) + residual.to(WIDE)).to(x.dtype)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def normalize_misaligned_kernel(
    y_ptr,  # [M, N]
    sum_ptr,  # [M, N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    x_ptr,  # [M, N]
    residual_ptr,  # [M, N] or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    eps,
    eps_low,
    M,
    N,
    phases,
    tiles,
    programs,  # a multiple of phases
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    VEC: tl.constexpr,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Persistent over tiles of whole rows in registers, the next of which are under way."""
    program = tl.program_id(0)
    at = columns(N, program % phases, VECTORS, VEC)
    _, _, col_inside, _, edge_inside = at
    weight, edge_weight = parameter(weight_ptr, at, 1.0, WIDE)
    bias, edge_bias = parameter(bias_ptr, at, 0.0, WIDE)
    n = N.to(WIDE)
    share = 1.0 / n
    row = rows_of(program, phases, ROWS)
    next_x, next_edge = read_row(x_ptr, row, M, N, at, VEC)
    if residual_ptr is not None:
        next_residual, next_edge_residual = read_row(residual_ptr, row, M, N, at, VEC)
    for _ in range(program, tiles, programs):
        x, edge = next_x, next_edge
        if residual_ptr is not None:
            x = rounded_sum(x, next_residual, WIDE)
            edge = rounded_sum(edge, next_edge_residual, WIDE)
        here = row
        row += programs * ROWS
        next_x, next_edge = read_row(x_ptr, row, M, N, at, VEC)
        if residual_ptr is not None:
            next_residual, next_edge_residual = read_row(residual_ptr, row, M, N, at, VEC)
            if sum_ptr is not None:
                write_row(sum_ptr, here, M, N, at, x, edge, VEC)
        v, edge_v = x.to(WIDE), edge.to(WIDE)
        mean = quotient(row_sum(v, edge_v), n, share)
        v = tl.where(col_inside, v - mean[:, None, None], 0.0)
        edge_v = tl.where(edge_inside, edge_v - mean[:, None], 0.0)
        variance = row_sum(v * v, edge_v * edge_v) * share
        rstd = inverse_root(variance, eps, eps_low, True, WIDE)
        tl.store(mean_ptr + here, mean, mask=here < M)
        tl.store(rstd_ptr + here, rstd, mask=here < M)
        y = VALUE(v * rstd[:, None, None] * weight + bias)
        edge_y = VALUE(edge_v * rstd[:, None] * edge_weight + edge_bias)
        write_row(y_ptr, here, M, N, at, y, edge_y, VEC)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["rstd_ptr"])
def backward_misaligned_kernel(
    dx_ptr,  # [M, N] or None
    dweight_ptr,  # [programs, N] or None
    dbias_ptr,  # [programs, N] or None
    x_ptr,  # [M, N]
    dy_ptr,  # [M, N]
    dsum_ptr,  # [M, N] or None
    weight_ptr,  # [N] or None
    bias_ptr,  # [N] or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    M,
    N,
    phases,
    tiles,
    programs,  # a multiple of phases
    ROWS: tl.constexpr,
    VECTORS: tl.constexpr,
    VEC: tl.constexpr,
    SLOPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The same; parameter gradients stay in registers to the end."""
    program = tl.program_id(0)
    at = columns(N, program % phases, VECTORS, VEC)
    _, _, col_inside, _, edge_inside = at
    weight, edge_weight = parameter(weight_ptr, at, 1.0, WIDE)
    if SLOPE is not None:
        bias, edge_bias = parameter(bias_ptr, at, 0.0, WIDE)
    share = 1.0 / N.to(WIDE)
    dweight = tl.zeros((ROWS, VECTORS, VEC), WIDE)
    dbias = tl.zeros((ROWS, VECTORS, VEC), WIDE)
    edge_dweight = tl.zeros((ROWS, VECTORS), WIDE)
    edge_dbias = tl.zeros((ROWS, VECTORS), WIDE)
    row = rows_of(program, phases, ROWS)
    x, edge_x = read_row(x_ptr, row, M, N, at, VEC)
    dy, edge_dy = read_row(dy_ptr, row, M, N, at, VEC)
    mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
    for _ in range(program, tiles, programs):
        x_hat = (x.to(WIDE) - mean[:, None, None]) * rstd[:, None, None]
        x_hat = tl.where(col_inside, x_hat, 0.0)
        edge_x_hat = tl.where(edge_inside, (edge_x.to(WIDE) - mean[:, None]) * rstd[:, None], 0.0)
        dz, edge_dz = dy.to(WIDE), edge_dy.to(WIDE)
        here, scale = row, rstd
        row += programs * ROWS
        x, edge_x = read_row(x_ptr, row, M, N, at, VEC)
        dy, edge_dy = read_row(dy_ptr, row, M, N, at, VEC)
        mean = tl.load(mean_ptr + row, mask=row < M, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        if SLOPE is not None:
            dz = dz * SLOPE(x_hat * weight + bias)
            edge_dz = edge_dz * SLOPE(edge_x_hat * edge_weight + edge_bias)
        if dweight_ptr is not None:
            dweight += dz * x_hat
            edge_dweight += edge_dz * edge_x_hat
        if dbias_ptr is not None:
            dbias += dz
            edge_dbias += edge_dz
        if dx_ptr is not None:
            g, edge_g = dz * weight, edge_dz * edge_weight
            sums = tl.join(
                tl.sum(g, axis=2) + edge_g, tl.sum(g * x_hat, axis=2) + edge_g * edge_x_hat
            )
            m1, m2 = tl.split(tl.sum(sums, axis=1))
            m1, m2 = scale * (m1 * share), scale * (m2 * share)
            dx = g * scale[:, None, None] - m1[:, None, None] - x_hat * m2[:, None, None]
            edge_dx = edge_g * scale[:, None] - m1[:, None] - edge_x_hat * m2[:, None]
            if dsum_ptr is not None:
                dsum, edge_dsum = read_row(dsum_ptr, here, M, N, at, VEC)
                dx += dsum.to(WIDE)
                edge_dx += edge_dsum.to(WIDE)
            write_row(dx_ptr, here, M, N, at, dx, edge_dx, VEC)
    store_sums(dweight_ptr, program, N, at, dweight, edge_dweight)
    store_sums(dbias_ptr, program, N, at, dbias, edge_dbias)
