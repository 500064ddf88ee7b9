"""Swish: beta's gradient is summed in the pass that computes the input's.

A tensor is cut as batch norm cuts it (one beta per channel); a single beta is one channel as long
as the tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    arrive,
    merge_sums,
    per_channel,
    store_partials,
    tile_offsets,
    total,
)


@triton.jit(do_not_specialize=RUNTIME)
def swish_forward_kernel(
    y_ptr,  # output, x's shape
    x_ptr, beta_ptr,  # inputs: x's shape, [C]
    N, C, S, x_stride_n, x_stride_c, x_stride_s, tiles,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    group = index // tiles
    beta = per_channel(beta_ptr, group, C * C_ALIGN, BLOCK_C, WIDE)[:, None, None]
    x_offset, y_offset, mask = tile_offsets(
        group, index - group * tiles, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
    tl.store(y_ptr + y_offset, x * tl.sigmoid(beta * x), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def swish_backward_kernel(
    dx_ptr, dbeta_ptr,  # outputs: x's shape, [C]
    x_ptr, dy_ptr, beta_ptr,  # inputs: x's shape twice, [C]
    partials_ptr, counters_ptr,  # [groups, 2, BLOCK_C, tiles], [groups]
    N, C, S, x_stride_n, x_stride_c, x_stride_s, tiles,
    NEED_DX: tl.constexpr, NEED_DBETA: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = C * C_ALIGN
    index = tl.program_id(0)
    group = index // tiles
    tile = index - group * tiles
    beta = per_channel(beta_ptr, group, channels, BLOCK_C, WIDE)[:, None, None]
    x_offset, y_offset, mask = tile_offsets(
        group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
    dy = tl.load(dy_ptr + y_offset, mask=mask, other=0.0).to(WIDE)
    s = tl.sigmoid(beta * x)
    rest = x * (s * (1.0 - s))
    if NEED_DX:
        tl.store(dx_ptr + y_offset, dy * (s + beta * rest), mask=mask)
    if NEED_DBETA:
        sum_dbeta = total(dy * (x * rest))
        store_partials(
            partials_ptr, group, tile, tiles, sum_dbeta, tl.zeros([BLOCK_C], WIDE), BLOCK_C
        )
        if arrive(counters_ptr + group) == tiles - 1:
            dbeta, _ = merge_sums(partials_ptr, group, tiles, BLOCK_C, WIDE)
            c = group * BLOCK_C + tl.arange(0, BLOCK_C)
            tl.store(dbeta_ptr + c, dbeta, mask=c < channels)
            tl.store(counters_ptr + group, 0)
