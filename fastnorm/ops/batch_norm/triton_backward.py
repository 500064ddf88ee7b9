"""Batch norm backward: both reductions, the input's, the residual's and the parameters' gradients
in one launch.

The pre-activation is recomputed from x and the statistics, so nothing the size of an activation is
saved beyond x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    affine,
    arrive,
    finish,
    merge_sums,
    per_channel,
    store_partials,
    ticket_tile,
    tile_offsets,
    total,
    wait,
)


@triton.jit
def channel_values(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, C,
    CENTER_ONLY: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """mean, rstd, scale, bias of a group, as the forward had them: [BLOCK_C] each."""
    mean = tl.zeros([BLOCK_C], WIDE)
    rstd = tl.full([BLOCK_C], 1.0, WIDE)
    if not CENTER_ONLY:
        mean = per_channel(mean_ptr, group, C, BLOCK_C, WIDE)
        rstd = per_channel(rstd_ptr, group, C, BLOCK_C, WIDE)
    scale, bias = affine(weight_ptr, bias_ptr, rstd, group, C, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE)
    return mean, rstd, scale, bias


@triton.jit
def gradient_tile(
    dy_ptr, x_ptr, residual_ptr, mean, rstd, scale, bias, x_offset, y_offset, mask,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTER_ONLY: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(dz, x_hat) of a tile, zero where it is masked; mean-only batch norm needs dz alone."""
    dz = tl.load(dy_ptr + y_offset, mask=mask, other=0.0).to(WIDE)
    x_hat = dz
    if not CENTER_ONLY:
        centred = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE) - mean[:, None, None]
        x_hat = tl.where(mask, centred * rstd[:, None, None], 0.0)
        if not PLAIN:
            z = centred * scale[:, None, None] + bias[:, None, None]
            if HAS_RESIDUAL:
                z += tl.load(residual_ptr + y_offset, mask=mask, other=0.0).to(WIDE)
            dz = tl.where(mask, dz * SLOPE(z), 0.0)
    return dz, x_hat


@triton.jit
def store_parameter_gradients(
    dweight_ptr, dbias_ptr, sum_dz, sum_dz_x_hat, group, C,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + c, sum_dz_x_hat, mask=c < C)
    if NEED_DBIAS:
        tl.store(dbias_ptr + c, sum_dz, mask=c < C)


@triton.jit
def store_input_gradients(
    dx_ptr, dresidual_ptr, dz, x_hat, scale, mean_dz, mean_dz_x_hat, y_offset, mask,
    CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
):  # fmt: skip
    if NEED_DX:
        dx = dz - mean_dz[:, None, None]
        if not CENTER_ONLY:
            dx = (dx - x_hat * mean_dz_x_hat[:, None, None]) * scale[:, None, None]
        tl.store(dx_ptr + y_offset, dx, mask=mask, eviction_policy="evict_first")
    if NEED_DRESIDUAL:
        tl.store(dresidual_ptr + y_offset, dz, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=RUNTIME)
def backward_ticket_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr,  # outputs: x's shape, [C], [C], x's shape
    # inputs: x's shape three times, then [C]
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    partials_ptr, counters_ptr,  # [groups, 2, BLOCK_C, tiles], [2 + groups]
    N, C, S, x_stride_n, x_stride_c, x_stride_s, groups, tiles, lag,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = C * C_ALIGN
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    reduces, index = ticket_tile(ticket, groups, tiles, lag)
    group = index // tiles
    tile = index - group * tiles
    mean, rstd, scale, bias = channel_values(
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        group,
        channels,
        CENTER_ONLY,
        HAS_WEIGHT,
        HAS_BIAS,
        BLOCK_C,
        WIDE,
    )
    x_offset, y_offset, mask = tile_offsets(
        group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    if not reduces:
        wait(counters_ptr + 2 + group, tiles)
    dz, x_hat = gradient_tile(
        dy_ptr, x_ptr, residual_ptr, mean, rstd, scale, bias, x_offset, y_offset, mask,
        SLOPE, PLAIN, HAS_RESIDUAL, CENTER_ONLY, WIDE,
    )  # fmt: skip
    if reduces:
        store_partials(partials_ptr, group, tile, tiles, total(dz), total(dz * x_hat), BLOCK_C)
        arrive(counters_ptr + 2 + group)
    else:
        sum_dz, sum_dz_x_hat = merge_sums(partials_ptr, group, tiles, BLOCK_C, WIDE)
        if tile == 0:
            store_parameter_gradients(
                dweight_ptr,
                dbias_ptr,
                sum_dz,
                sum_dz_x_hat,
                group,
                channels,
                NEED_DWEIGHT,
                NEED_DBIAS,
                BLOCK_C,
            )
        count = (N.to(tl.int64) * S * VEC).to(WIDE)
        store_input_gradients(
            dx_ptr, dresidual_ptr, dz, x_hat, scale, sum_dz / count, sum_dz_x_hat / count, y_offset,
            mask,
            CENTER_ONLY, NEED_DX, NEED_DRESIDUAL,
        )  # fmt: skip
    finish(counters_ptr, 2 * groups * tiles, groups, None, False)


@triton.jit(do_not_specialize=RUNTIME)
def backward_owner_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr,  # outputs: x's shape, [C], [C], x's shape
    # inputs: x's shape three times, then [C]
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    partials_ptr, counters_ptr,  # unused
    N, C, S, x_stride_n, x_stride_c, x_stride_s, groups, tiles, lag,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = C * C_ALIGN
    group = tl.program_id(0)
    mean, rstd, scale, bias = channel_values(
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        group,
        channels,
        CENTER_ONLY,
        HAS_WEIGHT,
        HAS_BIAS,
        BLOCK_C,
        WIDE,
    )
    sum_dz = tl.zeros([BLOCK_C], WIDE)
    sum_dz_x_hat = tl.zeros([BLOCK_C], WIDE)
    for tile in range(0, tiles):
        x_offset, y_offset, mask = tile_offsets(
            group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
            BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
        )  # fmt: skip
        dz, x_hat = gradient_tile(
            dy_ptr, x_ptr, residual_ptr, mean, rstd, scale, bias, x_offset, y_offset, mask,
            SLOPE, PLAIN, HAS_RESIDUAL, CENTER_ONLY, WIDE,
        )  # fmt: skip
        sum_dz += total(dz)
        sum_dz_x_hat += total(dz * x_hat)
    # one use each of what the loop yields: Triton 3.6 fails on a reduction in a loop whose result
    # has two
    sum_dz += 0.0
    sum_dz_x_hat += 0.0
    store_parameter_gradients(
        dweight_ptr,
        dbias_ptr,
        sum_dz,
        sum_dz_x_hat,
        group,
        channels,
        NEED_DWEIGHT,
        NEED_DBIAS,
        BLOCK_C,
    )
    count = (N.to(tl.int64) * S * VEC).to(WIDE)
    for back in range(0, tiles):
        x_offset, y_offset, mask = tile_offsets(  # in reverse: the last tile read is still close by
            group, tiles - 1 - back, N, C, S, x_stride_n, x_stride_c, x_stride_s,
            BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
        )  # fmt: skip
        dz, x_hat = gradient_tile(
            dy_ptr, x_ptr, residual_ptr, mean, rstd, scale, bias, x_offset, y_offset, mask,
            SLOPE, PLAIN, HAS_RESIDUAL, CENTER_ONLY, WIDE,
        )  # fmt: skip
        store_input_gradients(
            dx_ptr, dresidual_ptr, dz, x_hat, scale, sum_dz / count, sum_dz_x_hat / count, y_offset,
            mask,
            CENTER_ONLY, NEED_DX, NEED_DRESIDUAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def backward_pass_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr,  # outputs: x's shape, [C], [C], x's shape
    # inputs: x's shape three times, then [C]
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    partials_ptr, counters_ptr,  # [groups, 2, BLOCK_C, tiles], [2 + groups]
    N, C, S, x_stride_n, x_stride_c, x_stride_s, tiles,
    REDUCE: tl.constexpr,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass: dx does not depend on the sums (running statistics), or is not wanted; the last
    tile of a group merges."""
    channels = C * C_ALIGN
    index = tl.program_id(0)
    group = index // tiles
    tile = index - group * tiles
    mean, rstd, scale, bias = channel_values(
        mean_ptr,
        rstd_ptr,
        weight_ptr,
        bias_ptr,
        group,
        channels,
        CENTER_ONLY,
        HAS_WEIGHT,
        HAS_BIAS,
        BLOCK_C,
        WIDE,
    )
    x_offset, y_offset, mask = tile_offsets(
        group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    dz, x_hat = gradient_tile(
        dy_ptr, x_ptr, residual_ptr, mean, rstd, scale, bias, x_offset, y_offset, mask,
        SLOPE, PLAIN, HAS_RESIDUAL, CENTER_ONLY, WIDE,
    )  # fmt: skip
    none = tl.zeros([BLOCK_C], WIDE)
    store_input_gradients(
        dx_ptr,
        dresidual_ptr,
        dz,
        tl.zeros_like(dz),  # no x_hat: an infinite one times zero would be NaN
        scale,
        none,
        none,
        y_offset,
        mask,
        CENTER_ONLY,
        NEED_DX,
        NEED_DRESIDUAL,
    )
    if REDUCE:
        store_partials(partials_ptr, group, tile, tiles, total(dz), total(dz * x_hat), BLOCK_C)
        if arrive(counters_ptr + group) == tiles - 1:
            sum_dz, sum_dz_x_hat = merge_sums(partials_ptr, group, tiles, BLOCK_C, WIDE)
            store_parameter_gradients(
                dweight_ptr,
                dbias_ptr,
                sum_dz,
                sum_dz_x_hat,
                group,
                channels,
                NEED_DWEIGHT,
                NEED_DBIAS,
                BLOCK_C,
            )
            tl.store(counters_ptr + group, 0)
