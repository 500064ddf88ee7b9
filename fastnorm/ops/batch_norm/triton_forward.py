"""Batch norm forward: statistics, running statistics, normalisation, residual and activation in one
launch."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_merge import (
    merge_shares,
    settle,
    settled,
    share_size,
    share_statistics,
)
from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    affine,
    arrive,
    channel_count,
    exact,
    lane_channels,
    leave_zero,
    passed,
    per_channel,
    share_tiles,
    ticket_share,
    tile_offsets,
    to_lanes,
)


@triton.jit
def store_statistics(
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    mean, var, rstd, c, there, count, momentum, momentum_tail,
    CENTER_ONLY: tl.constexpr, UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr,
    CUMULATIVE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Save a group's statistics for backward and move the running ones."""
    if not CENTER_ONLY:
        tl.store(mean_ptr + c, mean, mask=there)
        tl.store(rstd_ptr + c, rstd, mask=there)
    if CUMULATIVE:
        factor = 1.0 / (tl.load(num_batches_tracked_ptr) + 1).to(WIDE)
    else:
        factor = exact(momentum, momentum_tail, WIDE)
    if UPDATE_MEAN:
        old = tl.load(running_mean_ptr + c, mask=there, other=0.0).to(WIDE)
        tl.store(running_mean_ptr + c, (1.0 - factor) * old + factor * mean, mask=there)
    if UPDATE_VAR:
        unbiased = var * (count / (count - 1.0))
        old = tl.load(running_var_ptr + c, mask=there, other=0.0).to(WIDE)
        tl.store(running_var_ptr + c, (1.0 - factor) * old + factor * unbiased, mask=there)


@triton.jit
def settle_statistics(
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, weight_ptr,
    mean, m2, group, count, momentum, momentum_tail, eps, eps_tail, at,
    HAS_WEIGHT: tl.constexpr, CENTER_ONLY: tl.constexpr,
    UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr, CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr, C_ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What follows from a group's moments, once; returns the scale: [CHANNELS]."""
    positions = tl.cast(count, tl.int64).to(WIDE)
    var = tl.maximum(m2, 0.0, propagate_nan=tl.PropagateNan.ALL) / positions
    channels, _ = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)
    c = group * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    rstd = tl.full([CHANNELS], 1.0, WIDE)
    if not CENTER_ONLY:
        rstd = 1.0 / tl.sqrt(var + exact(eps, eps_tail, WIDE))
    store_statistics(
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
        mean, var, rstd, c, there, positions, momentum, momentum_tail,
        CENTER_ONLY, UPDATE_MEAN, UPDATE_VAR, CUMULATIVE, WIDE,
    )  # fmt: skip
    scale, _ = affine(weight_ptr, None, rstd, c, there, HAS_WEIGHT, False, WIDE)
    return scale


@triton.jit
def normalize_share(
    y_ptr, x_ptr, residual_ptr, mean, scale, bias, group, begin, step, length, at,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    for i in range(0, length):
        x_offset, y_offset, mask = tile_offsets(
            group, begin + i * step, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0, eviction_policy="evict_first")
        z = (x.to(WIDE) - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
        if HAS_RESIDUAL:
            residual = tl.load(
                residual_ptr + y_offset, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            z += residual.to(WIDE)
        tl.store(y_ptr + y_offset, VALUE(z), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=RUNTIME)
def forward_ticket_kernel(
    # outputs: x's shape, then [C]
    y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # inputs: x's shape, x's shape, [C], [C]
    partials_ptr, counters_ptr,  # see triton_merge.py
    momentum, momentum_tail, eps, eps_tail,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    groups, together, lag,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr,
    UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr, TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    BLOCK: tl.constexpr = BLOCK_V if ROWS else BLOCK_V * VEC
    shares = tl.cdiv(tiles, run)
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    reduces, group, share = ticket_share(ticket, groups, shares, together, lag)
    first, length = share_tiles(share, tiles, run)
    if reduces:
        plane = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)[1]
        size = share_size(share, shares, count, run, plane, BLOCK, WIDE)
        mean, m2 = share_statistics(
            x_ptr, group, first, length, size, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
        )  # fmt: skip
        last, mean, m2 = merge_shares(
            partials_ptr, counters_ptr + 2, group, groups, share, shares, mean, m2,
            count, run, plane, True, BLOCK, CHANNELS, WIDE,
        )  # fmt: skip
        if last:
            scale = settle_statistics(
                mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
                weight_ptr, mean, m2, group, count, momentum, momentum_tail, eps, eps_tail, at,
                HAS_WEIGHT, CENTER_ONLY, UPDATE_MEAN, UPDATE_VAR, CUMULATIVE,
                BLOCK_C, CHANNELS, C_ALIGN, WIDE,
            )  # fmt: skip
            settle(partials_ptr, counters_ptr + 2, group, shares, mean, scale, CHANNELS)
    else:
        within, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
        centre, slope = settled(
            partials_ptr, counters_ptr + 2, group, shares, within, there, CHANNELS
        )
        bias = affine(None, bias_ptr, slope, c, there, False, HAS_BIAS, WIDE)[1]
        normalize_share(
            y_ptr, x_ptr, residual_ptr, centre, slope, bias, group,
            tl.where(lag < 0, first + length - 1, first), tl.where(lag < 0, -1, 1), length, at,
            VALUE, HAS_RESIDUAL, BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST,
            ROWS, LONG, WIDE,
        )  # fmt: skip
        if passed(counters_ptr + 1) == groups * shares - 1:
            leave_zero(counters_ptr, groups, num_batches_tracked_ptr, TRACK)


@triton.jit(do_not_specialize=RUNTIME)
def forward_owner_kernel(
    # outputs: x's shape, then [C]
    y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # inputs: x's shape, x's shape, [C], [C]
    partials_ptr, counters_ptr,  # unused, [2 + groups]
    momentum, momentum_tail, eps, eps_tail,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    groups, together, lag,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr,
    UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr, TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    group = tl.program_id(0)
    size = tl.cast(count, tl.int64).to(WIDE)
    mean, m2 = share_statistics(
        x_ptr, group, 0, tiles, size, at,
        BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
    )  # fmt: skip
    scale = settle_statistics(
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr, weight_ptr,
        mean, m2, group, count, momentum, momentum_tail, eps, eps_tail, at,
        HAS_WEIGHT, CENTER_ONLY, UPDATE_MEAN, UPDATE_VAR, CUMULATIVE,
        BLOCK_C, CHANNELS, C_ALIGN, WIDE,
    )  # fmt: skip
    mean = to_lanes(mean, at, BLOCK_C, CHANNELS, C_ALIGN)
    scale = to_lanes(scale, at, BLOCK_C, CHANNELS, C_ALIGN)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    _, bias = affine(None, bias_ptr, scale, c, there, False, HAS_BIAS, WIDE)
    normalize_share(  # in reverse: the last tile read is still close by
        y_ptr, x_ptr, residual_ptr, mean, scale, bias, group, tiles - 1, -1, tiles, at,
        VALUE, HAS_RESIDUAL, BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST,
        ROWS, LONG, WIDE,
    )  # fmt: skip
    if TRACK:
        if arrive(counters_ptr + 1) == groups - 1:
            leave_zero(counters_ptr, groups, num_batches_tracked_ptr, TRACK)


@triton.jit(do_not_specialize=RUNTIME)
def forward_running_kernel(
    y_ptr, mean_ptr, rstd_ptr,  # outputs: x's shape, [C], [C]
    # inputs: x's shape twice, then [C]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    eps, eps_tail,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Normalise with running statistics: nothing to wait for."""
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    shares = tl.cdiv(tiles, run)
    index = tl.program_id(0)
    group = index // shares
    share = index - group * shares
    first, length = share_tiles(share, tiles, run)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    mean = per_channel(running_mean_ptr, c, there, WIDE)
    rstd = tl.full([BLOCK_C], 1.0, WIDE)
    if not CENTER_ONLY:
        var = per_channel(running_var_ptr, c, there, WIDE)
        rstd = 1.0 / tl.sqrt(var + exact(eps, eps_tail, WIDE))
        if share == 0:
            tl.store(mean_ptr + c, mean, mask=there)
            tl.store(rstd_ptr + c, rstd, mask=there)
    scale, bias = affine(weight_ptr, bias_ptr, rstd, c, there, HAS_WEIGHT, HAS_BIAS, WIDE)
    normalize_share(
        y_ptr, x_ptr, residual_ptr, mean, scale, bias, group, first, 1, length, at,
        VALUE, HAS_RESIDUAL, BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST,
        ROWS, LONG, WIDE,
    )  # fmt: skip
