"""Batch norm backward: both reductions, the input's, the residual's and the parameters' gradients
in one launch.

The pre-activation is recomputed from x and the statistics, so nothing the size of an activation is
saved beyond x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_merge import merge_shares, settle, settled
from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    affine,
    channel_count,
    fold,
    lane_channels,
    leave_zero,
    passed,
    per_channel,
    share_tiles,
    ticket_share,
    tile_offsets,
    to_channels,
    to_lanes,
    total,
)


@triton.jit
def channel_values(
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, there,
    CENTER_ONLY: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """mean, rstd, scale, bias of a group, as the forward had them: [BLOCK_C] each."""
    mean = tl.zeros([BLOCK_C], WIDE)
    rstd = tl.full([BLOCK_C], 1.0, WIDE)
    if not CENTER_ONLY:
        mean = per_channel(mean_ptr, c, there, WIDE)
        rstd = per_channel(rstd_ptr, c, there, WIDE)
    scale, bias = affine(weight_ptr, bias_ptr, rstd, c, there, HAS_WEIGHT, HAS_BIAS, WIDE)
    return mean, rstd, scale, bias


@triton.jit
def gradient_tile(
    dy_ptr, x_ptr, kept_ptr, mean, scale, bias, x_offset, y_offset, mask,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, CENTER_ONLY: tl.constexpr,
    EVICT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(dz, x - mean) of a tile; dz is zero where it is masked. Mean-only batch norm needs dz alone.
    KEPT is "residual" or "y", which tells the slope by itself, or ""."""
    dz = tl.load(dy_ptr + y_offset, mask=mask, other=0.0, eviction_policy=EVICT).to(WIDE)
    centred = dz
    if not CENTER_ONLY:
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0, eviction_policy=EVICT)
        centred = x.to(WIDE) - mean[:, None, None]
        if not PLAIN:
            kept = centred
            if KEPT != "":
                kept = tl.load(kept_ptr + y_offset, mask=mask, other=0.0, eviction_policy=EVICT)
                kept = kept.to(WIDE)
            if KEPT == "y":
                dz = dz * SLOPE(kept)
            else:
                z = centred * scale[:, None, None] + bias[:, None, None]
                if KEPT == "residual":
                    z += kept
                dz = dz * SLOPE(z)
    return dz, centred


@triton.jit
def share_sums(
    dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias, group, first, length, at,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, CENTER_ONLY: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(sum of dz, sum of dz * x_hat) of `length` tiles: [CHANNELS] each."""
    sum_dz = fold(tl.zeros([BLOCK_C, BLOCK_V, 1 if ROWS else VEC], WIDE), VEC, X_LAST, Y_LAST, ROWS)
    sum_dz_centred = sum_dz
    for tile in range(first, first + length):
        x_offset, y_offset, mask = tile_offsets(
            group, tile, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        dz, centred = gradient_tile(
            dy_ptr, x_ptr, kept_ptr, mean, scale, bias, x_offset, y_offset, mask,
            SLOPE, PLAIN, KEPT, CENTER_ONLY, "", WIDE,
        )  # fmt: skip
        sum_dz += fold(dz, VEC, X_LAST, Y_LAST, ROWS)
        sum_dz_centred += fold(dz * centred, VEC, X_LAST, Y_LAST, ROWS)
    sum_dz_x_hat = total(sum_dz_centred) * rstd
    return (
        to_channels(total(sum_dz), at, BLOCK_C, CHANNELS, C_ALIGN),
        to_channels(sum_dz_x_hat, at, BLOCK_C, CHANNELS, C_ALIGN),
    )


@triton.jit
def store_parameter_gradients(
    dweight_ptr, dbias_ptr, sum_dz, sum_dz_x_hat, group, at,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr, C_ALIGN: tl.constexpr,
):  # fmt: skip
    channels, _ = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)
    c = group * CHANNELS + tl.arange(0, CHANNELS)
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + c, sum_dz_x_hat, mask=c < channels)
    if NEED_DBIAS:
        tl.store(dbias_ptr + c, sum_dz, mask=c < channels)


@triton.jit
def apply_share(
    dx_ptr, dresidual_ptr, dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias,
    mean_dz, mean_dz_x_hat, group, begin, step, length, at,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, CENTER_ONLY: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = scale * (dz - mean_dz - x_hat * mean_dz_x_hat), as two multiplications."""
    shift = scale * mean_dz
    slope = scale * rstd * mean_dz_x_hat
    for i in range(0, length):
        x_offset, y_offset, mask = tile_offsets(
            group, begin + i * step, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        dz, centred = gradient_tile(
            dy_ptr, x_ptr, kept_ptr, mean, scale, bias, x_offset, y_offset, mask,
            SLOPE, PLAIN, KEPT, CENTER_ONLY, "evict_first", WIDE,
        )  # fmt: skip
        if NEED_DX:
            dx = dz * scale[:, None, None] - shift[:, None, None]
            if not CENTER_ONLY:
                dx -= centred * slope[:, None, None]
            tl.store(dx_ptr + y_offset, dx, mask=mask, eviction_policy="evict_first")
        if NEED_DRESIDUAL:
            tl.store(dresidual_ptr + y_offset, dz, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=RUNTIME)
def backward_ticket_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr,  # outputs: x's shape, [C], [C], x's shape
    # inputs: x's shape three times, then [C]
    dy_ptr, x_ptr, kept_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    partials_ptr, counters_ptr,  # see triton_merge.py
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    groups, together, lag,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    shares = tl.cdiv(tiles, run)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    reduces, group, share = ticket_share(ticket, groups, shares, together, lag)
    first, length = share_tiles(share, tiles, run)
    within, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    mean, rstd, scale, bias = channel_values(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, there,
        CENTER_ONLY, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE,
    )  # fmt: skip
    if reduces:
        sum_dz, sum_dz_x_hat = share_sums(
            dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias, group, first, length, at,
            SLOPE, PLAIN, KEPT, CENTER_ONLY, BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN,
            X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
        )  # fmt: skip
        last, all_dz, all_dz_x_hat = merge_shares(
            partials_ptr, counters_ptr + 2, group, groups, share, shares, sum_dz, sum_dz_x_hat,
            count, run, 1, False, 1, CHANNELS, WIDE,
        )  # fmt: skip
        if last:
            store_parameter_gradients(
                dweight_ptr, dbias_ptr, all_dz, all_dz_x_hat, group, at,
                NEED_DWEIGHT, NEED_DBIAS, BLOCK_C, CHANNELS, C_ALIGN,
            )  # fmt: skip
            positions = tl.cast(count, tl.int64).to(WIDE)
            settle(
                partials_ptr, counters_ptr + 2, group, shares,
                all_dz / positions, all_dz_x_hat / positions, CHANNELS,
            )  # fmt: skip
    else:
        mean_dz, mean_dz_x_hat = settled(
            partials_ptr, counters_ptr + 2, group, shares, within, there, CHANNELS
        )
        apply_share(
            dx_ptr, dresidual_ptr, dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias,
            mean_dz, mean_dz_x_hat, group, tl.where(lag < 0, first + length - 1, first),
            tl.where(lag < 0, -1, 1), length, at,
            SLOPE, PLAIN, KEPT, CENTER_ONLY, NEED_DX, NEED_DRESIDUAL,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
        )  # fmt: skip
        if passed(counters_ptr + 1) == groups * shares - 1:
            leave_zero(counters_ptr, groups, None, False)


@triton.jit(do_not_specialize=RUNTIME)
def backward_owner_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr,  # outputs: x's shape, [C], [C], x's shape
    # inputs: x's shape three times, then [C]
    dy_ptr, x_ptr, kept_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    partials_ptr, counters_ptr,  # unused
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    groups, together, lag,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    group = tl.program_id(0)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    mean, rstd, scale, bias = channel_values(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, there,
        CENTER_ONLY, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE,
    )  # fmt: skip
    sum_dz, sum_dz_x_hat = share_sums(
        dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias, group, 0, tiles, at,
        SLOPE, PLAIN, KEPT, CENTER_ONLY, BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN,
        X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
    )  # fmt: skip
    store_parameter_gradients(
        dweight_ptr, dbias_ptr, sum_dz, sum_dz_x_hat, group, at,
        NEED_DWEIGHT, NEED_DBIAS, BLOCK_C, CHANNELS, C_ALIGN,
    )  # fmt: skip
    positions = tl.cast(count, tl.int64).to(WIDE)
    apply_share(  # in reverse: the last tile read is still close by
        dx_ptr, dresidual_ptr, dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias,
        to_lanes(sum_dz / positions, at, BLOCK_C, CHANNELS, C_ALIGN),
        to_lanes(sum_dz_x_hat / positions, at, BLOCK_C, CHANNELS, C_ALIGN),
        group, tiles - 1, -1, tiles, at,
        SLOPE, PLAIN, KEPT, CENTER_ONLY, NEED_DX, NEED_DRESIDUAL,
        BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def backward_pass_kernel(
    dx_ptr, dweight_ptr, dbias_ptr, dresidual_ptr,  # outputs: x's shape, [C], [C], x's shape
    # inputs: x's shape three times, then [C]
    dy_ptr, x_ptr, kept_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    partials_ptr, counters_ptr,  # see triton_merge.py
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    REDUCE: tl.constexpr,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr, NEED_DX: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass: dx does not depend on the sums (running statistics), or is not wanted; the last
    program of a group merges."""
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    shares = tl.cdiv(tiles, run)
    index = tl.program_id(0)
    group = index // shares
    share = index - group * shares
    first, length = share_tiles(share, tiles, run)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    mean, _, scale, bias = channel_values(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, there,
        CENTER_ONLY, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE,
    )  # fmt: skip
    sum_dz = fold(tl.zeros([BLOCK_C, BLOCK_V, 1 if ROWS else VEC], WIDE), VEC, X_LAST, Y_LAST, ROWS)
    sum_dz_centred = sum_dz
    for tile in range(first, first + length):
        x_offset, y_offset, mask = tile_offsets(
            group, tile, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        dz, centred = gradient_tile(
            dy_ptr, x_ptr, kept_ptr, mean, scale, bias, x_offset, y_offset, mask,
            SLOPE, PLAIN, KEPT, CENTER_ONLY, "evict_first", WIDE,
        )  # fmt: skip
        if NEED_DX:
            dx = dz * scale[:, None, None]
            tl.store(dx_ptr + y_offset, dx, mask=mask, eviction_policy="evict_first")
        if NEED_DRESIDUAL:
            tl.store(dresidual_ptr + y_offset, dz, mask=mask, eviction_policy="evict_first")
        if REDUCE:
            sum_dz += fold(dz, VEC, X_LAST, Y_LAST, ROWS)
            sum_dz_centred += fold(dz * centred, VEC, X_LAST, Y_LAST, ROWS)
    if REDUCE:
        last, all_dz, all_dz_centred = merge_shares(
            partials_ptr, counters_ptr, group, tl.num_programs(0) // shares, share, shares,
            to_channels(total(sum_dz), at, BLOCK_C, CHANNELS, C_ALIGN),
            to_channels(total(sum_dz_centred), at, BLOCK_C, CHANNELS, C_ALIGN),
            count, run, 1, False, 1, CHANNELS, WIDE,
        )  # fmt: skip
        if last:
            if not CENTER_ONLY:  # read again: a register less in the loop
                own = group * CHANNELS + tl.arange(0, CHANNELS)
                channels = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)[0]
                all_dz_centred *= per_channel(rstd_ptr, own, own < channels, WIDE)
            store_parameter_gradients(
                dweight_ptr, dbias_ptr, all_dz, all_dz_centred, group, at,
                NEED_DWEIGHT, NEED_DBIAS, BLOCK_C, CHANNELS, C_ALIGN,
            )  # fmt: skip
            tl.store(counters_ptr + group, 0)
