"""Synchronised batch norm in Triton: what comes before and after its two collectives.

Forward: statistics of this process, the merge of all processes' ones, then the kernel that
normalises with running statistics. Backward: the kernel of one pass for the sums, then the input's
gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_backward import (
    channel_values,
    gradient_tile,
    store_input_gradients,
)
from fastnorm.ops.batch_norm.triton_forward import store_statistics
from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    arrive,
    finish,
    merge_statistics,
    per_channel,
    store_partials,
    tile_offsets,
    tile_size,
    tile_statistics,
)


@triton.jit(do_not_specialize=RUNTIME)
def statistics_kernel(
    statistics_ptr,  # output: [2 * C + 1]: mean, sum of squared deviations, count
    x_ptr,  # input, its own shape
    partials_ptr, counters_ptr,  # [groups, 2, BLOCK_C, tiles], [groups]
    N, C, S, x_stride_n, x_stride_c, x_stride_s, tiles,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile per program; the last of a group to arrive merges the group's tiles."""
    channels = C * C_ALIGN
    BLOCK: tl.constexpr = BLOCK_V * VEC
    index = tl.program_id(0)
    group = index // tiles
    tile = index - group * tiles
    x_offset, _, mask = tile_offsets(
        group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
    mean, m2 = tile_statistics(x, mask, tile_size(tile, N, S, VEC, BLOCK, WIDE))
    store_partials(partials_ptr, group, tile, tiles, mean, m2, BLOCK_C)
    if arrive(counters_ptr + group) == tiles - 1:
        mean, var = merge_statistics(partials_ptr, group, tiles, N, S, VEC, BLOCK, BLOCK_C, WIDE)
        count = (N.to(tl.int64) * S * VEC).to(WIDE)
        c = group * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(statistics_ptr + c, mean, mask=c < channels)
        tl.store(statistics_ptr + channels + c, var * count, mask=c < channels)
        if group == 0:
            tl.store(statistics_ptr + 2 * channels, count)
        tl.store(counters_ptr + group, 0)


@triton.jit
def load_ranks(gathered_ptr, start, ranks, c, C, BLOCK_R: tl.constexpr):
    """(count, mean, sum of squared deviations) of some ranks: [BLOCK_R, 1], [BLOCK_R, BLOCK_C]
    twice."""
    r = start + tl.arange(0, BLOCK_R)
    row = (gathered_ptr + r.to(tl.int64) * (2 * C + 1))[:, None]
    there = (r < ranks)[:, None]
    mask = there & (c < C)[None, :]
    size = tl.load(row + 2 * C, mask=there, other=0.0)
    mean = tl.load(row + c[None, :], mask=mask, other=0.0)
    return size, mean, tl.load(row + C + c[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["momentum", "momentum_tail", "ranks", "C"])
def merge_ranks_kernel(
    # outputs: [C], [C], [], [C], [C], []
    mean_ptr, var_ptr, count_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    gathered_ptr, counters_ptr,  # [ranks, 2 * C + 1], [2]
    momentum, momentum_tail, ranks, C,
    UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr, TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All ranks' statistics as one (Chan, Golub & LeVeque 1979), the same bits on every rank."""
    group = tl.program_id(0)
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    first = per_channel(gathered_ptr, group, C, BLOCK_C, WIDE)
    # an infinite mean must stay infinite, not become NaN
    pivot = tl.where(first - first == 0, first, 0.0)
    count = tl.zeros([BLOCK_R, 1], WIDE)
    shift = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for start in range(0, ranks, BLOCK_R):
        size, mean, _ = load_ranks(gathered_ptr, start, ranks, c, C, BLOCK_R)
        count += size
        shift += tl.where(size > 0, size * (mean - pivot[None, :]), 0.0)
    total = tl.sum(tl.sum(count, axis=1), axis=0)
    divisor = tl.maximum(total, 1.0)
    merged = pivot + tl.sum(shift, axis=0) / divisor
    m2 = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for start in range(0, ranks, BLOCK_R):
        size, mean, within = load_ranks(gathered_ptr, start, ranks, c, C, BLOCK_R)
        deviation = mean - merged[None, :]
        m2 += tl.where(size > 0, within + size * deviation * deviation, 0.0)
    var = tl.sum(m2, axis=0) / divisor
    tl.store(mean_ptr + c, merged, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)
    if group == 0:
        tl.store(count_ptr, total)
    # fewer than two values have no unbiased variance: no channel of the running ones moves
    moved = tl.where(total > 1.0, C, 0)
    values = tl.maximum(total, 2.0)
    store_statistics(
        mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
        merged, var, var, group, moved, values, momentum, momentum_tail,
        True, UPDATE_MEAN, UPDATE_VAR, TRACK, CUMULATIVE, BLOCK_C, WIDE,
    )  # fmt: skip
    if TRACK:
        finish(counters_ptr, tl.num_programs(0), 0, num_batches_tracked_ptr, TRACK)


@triton.jit(do_not_specialize=RUNTIME)
def apply_kernel(
    dx_ptr, dresidual_ptr,  # outputs: x's shape
    # inputs: x's shape three times, then [C], then [2 * C] and []
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr, count_ptr,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, tiles,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The input's gradient from the sums of all ranks."""
    channels = C * C_ALIGN
    index = tl.program_id(0)
    group = index // tiles
    tile = index - group * tiles
    mean, rstd, scale, bias = channel_values(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channels,
        False, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE,
    )  # fmt: skip
    count = tl.load(count_ptr)
    mean_dz = per_channel(sums_ptr, group, channels, BLOCK_C, WIDE) / count
    mean_dz_x_hat = per_channel(sums_ptr + channels, group, channels, BLOCK_C, WIDE) / count
    x_offset, y_offset, mask = tile_offsets(
        group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    dz, x_hat = gradient_tile(
        dy_ptr, x_ptr, residual_ptr, mean, rstd, scale, bias, x_offset, y_offset, mask,
        SLOPE, PLAIN, HAS_RESIDUAL, False, WIDE,
    )  # fmt: skip
    store_input_gradients(
        dx_ptr, dresidual_ptr, dz, x_hat, scale, mean_dz, mean_dz_x_hat, y_offset, mask,
        False, True, NEED_DRESIDUAL,
    )  # fmt: skip
