"""Swish: beta's gradient is summed in the pass that computes the input's.

A tensor is cut as batch norm cuts it (one beta per channel); a single beta is one channel as long
as the tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.activation.triton_values import sigmoid
from fastnorm.ops.batch_norm.triton_merge import merge_shares
from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    channel_count,
    fold,
    lane_channels,
    per_channel,
    share_tiles,
    tile_offsets,
    to_channels,
    total,
)


@triton.jit(do_not_specialize=RUNTIME)
def swish_forward_kernel(
    y_ptr,  # output, x's shape
    x_ptr, beta_ptr,  # inputs: x's shape, [C]
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    shares = tl.cdiv(tiles, run)
    index = tl.program_id(0)
    group = index // shares
    first, length = share_tiles(index - group * shares, tiles, run)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    beta = per_channel(beta_ptr, c, there, WIDE)[:, None, None]
    for tile in range(first, first + length):
        x_offset, y_offset, mask = tile_offsets(
            group, tile, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
        tl.store(y_ptr + y_offset, x * sigmoid(beta * x), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def swish_backward_kernel(
    dx_ptr, dbeta_ptr,  # outputs: x's shape, [C]
    x_ptr, dy_ptr, beta_ptr,  # inputs: x's shape twice, [C]
    partials_ptr, counters_ptr,  # see triton_merge.py
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width, count, tiles, run,
    NEED_DX: tl.constexpr, NEED_DBETA: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at = (N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width)
    shares = tl.cdiv(tiles, run)
    index = tl.program_id(0)
    group = index // shares
    share = index - group * shares
    first, length = share_tiles(share, tiles, run)
    _, c, there = lane_channels(group, at, BLOCK_C, CHANNELS, C_ALIGN)
    beta = per_channel(beta_ptr, c, there, WIDE)[:, None, None]
    sum_dbeta = fold(
        tl.zeros([BLOCK_C, BLOCK_V, 1 if ROWS else VEC], WIDE), VEC, X_LAST, Y_LAST, ROWS
    )
    for tile in range(first, first + length):
        x_offset, y_offset, mask = tile_offsets(
            group, tile, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
        dy = tl.load(dy_ptr + y_offset, mask=mask, other=0.0).to(WIDE)
        s = sigmoid(beta * x)
        rest = x * (s * (1.0 - s))
        if NEED_DX:
            tl.store(dx_ptr + y_offset, dy * (s + beta * rest), mask=mask)
        if NEED_DBETA:
            sum_dbeta += fold(dy * (x * rest), VEC, X_LAST, Y_LAST, ROWS)
    if NEED_DBETA:
        channels = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)[0]
        own = to_channels(total(sum_dbeta), at, BLOCK_C, CHANNELS, C_ALIGN)
        last, dbeta, _ = merge_shares(
            partials_ptr, counters_ptr, group, tl.num_programs(0) // shares, share, shares,
            own, tl.zeros([CHANNELS], WIDE), count, run, 1, False, 1, CHANNELS, WIDE,
        )  # fmt: skip
        if last:
            # a name of its own: in flat rows there are fewer channels than lanes
            channel = group * CHANNELS + tl.arange(0, CHANNELS)
            tl.store(dbeta_ptr + channel, dbeta, mask=channel < channels)
            tl.store(counters_ptr + group, 0)
