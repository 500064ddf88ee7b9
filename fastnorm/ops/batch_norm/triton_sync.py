"""Synchronised batch norm in Triton: what comes before and after its two collectives.

Forward: statistics of this process, the merge of all processes' ones, then the kernel that
normalises with running statistics. Backward: the kernel of one pass for the sums, then the input's
gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_backward import apply_share, channel_values
from fastnorm.ops.batch_norm.triton_forward import store_statistics
from fastnorm.ops.batch_norm.triton_merge import (
    merge_shares,
    share_size,
    share_statistics,
)
from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    arrive,
    channel_count,
    lane_channels,
    leave_zero,
    per_channel,
    share_tiles,
)


@triton.jit(do_not_specialize=RUNTIME)
def statistics_kernel(
    statistics_ptr,  # output: [2 * C + 1]: mean, sum of squared deviations, count
    x_ptr,  # input, its own shape
    partials_ptr, counters_ptr,  # see triton_merge.py
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One share per program; the last of a group to arrive merges them all."""
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    BLOCK: tl.constexpr = BLOCK_V if ROWS else BLOCK_V * VEC
    channels, plane = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)
    shares = tl.cdiv(tiles, run)
    index = tl.program_id(0)
    group = index // shares
    share = index - group * shares
    first, length = share_tiles(share, tiles, run)
    size = share_size(share, shares, count, run, plane, BLOCK, WIDE)
    mean, m2 = share_statistics(
        x_ptr, group, first, length, size, at,
        BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
    )  # fmt: skip
    last, merged, squares = merge_shares(
        partials_ptr, counters_ptr, group, tl.num_programs(0) // shares, share, shares, mean, m2,
        count, run, plane, True, BLOCK, CHANNELS, WIDE,
    )  # fmt: skip
    if last:
        squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
        c = group * CHANNELS + tl.arange(0, CHANNELS)
        tl.store(statistics_ptr + c, merged, mask=c < channels)
        tl.store(statistics_ptr + channels + c, squares, mask=c < channels)
        if group == 0:
            tl.store(statistics_ptr + 2 * channels, tl.cast(count, tl.int64).to(WIDE))
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
    first = per_channel(gathered_ptr, c, c < C, WIDE)
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
        merged, var, var, c, c < moved, values, momentum, momentum_tail,
        True, UPDATE_MEAN, UPDATE_VAR, CUMULATIVE, WIDE,
    )  # fmt: skip
    if TRACK:
        if arrive(counters_ptr + 1) == tl.num_programs(0) - 1:
            leave_zero(counters_ptr, 0, num_batches_tracked_ptr, TRACK)


@triton.jit(do_not_specialize=RUNTIME)
def apply_kernel(
    dx_ptr, dresidual_ptr,  # outputs: x's shape
    # inputs: x's shape three times, then [C], then [2 * C] and []
    dy_ptr, x_ptr, kept_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sums_ptr, count_ptr,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, KEPT: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, NEED_DRESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The input's gradient from the sums of all ranks."""
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    channels, _ = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)
    shares = tl.cdiv(tiles, run)
    index = tl.program_id(0)
    group = index // shares
    first, length = share_tiles(index - group * shares, tiles, run)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    mean, rstd, scale, bias = channel_values(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c, there,
        False, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE,
    )  # fmt: skip
    positions = tl.load(count_ptr)
    apply_share(
        dx_ptr, dresidual_ptr, dy_ptr, x_ptr, kept_ptr, mean, rstd, scale, bias,
        per_channel(sums_ptr, c, there, WIDE) / positions,
        per_channel(sums_ptr + channels, c, there, WIDE) / positions,
        group, first, 1, length, at,
        SLOPE, PLAIN, KEPT, False, True, NEED_DRESIDUAL,
        BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG, WIDE,
    )  # fmt: skip
