"""Batch norm forward: statistics, running statistics, normalisation, residual and activation in one
launch."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_tiles import (
    RUNTIME,
    affine,
    arrive,
    exact,
    finish,
    merge_statistics,
    per_channel,
    store_partials,
    ticket_tile,
    tile_offsets,
    tile_size,
    tile_statistics,
    wait,
)


@triton.jit
def store_statistics(
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    mean, var, rstd, group, C, count, momentum, momentum_tail,
    CENTER_ONLY: tl.constexpr, UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr,
    TRACK: tl.constexpr, CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Save a group's statistics for backward and move the running ones."""
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    if not CENTER_ONLY:
        tl.store(mean_ptr + c, mean, mask=mask)
        tl.store(rstd_ptr + c, rstd, mask=mask)
    if CUMULATIVE:
        factor = 1.0 / (tl.load(num_batches_tracked_ptr) + 1).to(WIDE)
    else:
        factor = exact(momentum, momentum_tail, WIDE)
    if UPDATE_MEAN:
        old = tl.load(running_mean_ptr + c, mask=mask, other=0.0).to(WIDE)
        tl.store(running_mean_ptr + c, (1.0 - factor) * old + factor * mean, mask=mask)
    if UPDATE_VAR:
        unbiased = var * (count / (count - 1.0))
        old = tl.load(running_var_ptr + c, mask=mask, other=0.0).to(WIDE)
        tl.store(running_var_ptr + c, (1.0 - factor) * old + factor * unbiased, mask=mask)


@triton.jit
def normalize_tile(
    y_ptr, x_ptr, residual_ptr, mean, scale, bias, x_offset, y_offset, mask,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0, eviction_policy="evict_first").to(WIDE)
    z = (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + y_offset, mask=mask, other=0.0).to(WIDE)
    tl.store(y_ptr + y_offset, VALUE(z), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=RUNTIME)
def forward_ticket_kernel(
    # outputs: x's shape, then [C]
    y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # inputs: x's shape, x's shape, [C], [C]
    partials_ptr, counters_ptr,  # [groups, 2, BLOCK_C, tiles], [2 + groups]
    momentum, momentum_tail, eps, eps_tail,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, groups, tiles, lag,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr,
    UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr, TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = C * C_ALIGN
    BLOCK: tl.constexpr = BLOCK_V * VEC
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    reduces, index = ticket_tile(ticket, groups, tiles, lag)
    group = index // tiles
    tile = index - group * tiles
    # the offsets of a tile are made where they are used: kept over the wait and the merge they
    # would spill
    if reduces:
        x_offset, _, mask = tile_offsets(
            group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
            BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
        )  # fmt: skip
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
        mean, m2 = tile_statistics(x, mask, tile_size(tile, N, S, VEC, BLOCK, WIDE))
        store_partials(partials_ptr, group, tile, tiles, mean, m2, BLOCK_C)
        arrive(counters_ptr + 2 + group)
    else:
        wait(counters_ptr + 2 + group, tiles)
        mean, var = merge_statistics(partials_ptr, group, tiles, N, S, VEC, BLOCK, BLOCK_C, WIDE)
        rstd = tl.full([BLOCK_C], 1.0, WIDE)
        if not CENTER_ONLY:
            rstd = 1.0 / tl.sqrt(var + exact(eps, eps_tail, WIDE))
        if tile == 0:
            store_statistics(
                mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
                mean, var, rstd, group, channels, (N.to(tl.int64) * S * VEC).to(WIDE),
                momentum, momentum_tail,
                CENTER_ONLY, UPDATE_MEAN, UPDATE_VAR, TRACK, CUMULATIVE, BLOCK_C, WIDE,
            )  # fmt: skip
        scale, bias = affine(
            weight_ptr, bias_ptr, rstd, group, channels, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE
        )
        x_offset, y_offset, mask = tile_offsets(
            group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
            BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
        )  # fmt: skip
        normalize_tile(
            y_ptr,
            x_ptr,
            residual_ptr,
            mean,
            scale,
            bias,
            x_offset,
            y_offset,
            mask,
            VALUE,
            HAS_RESIDUAL,
            WIDE,
        )
    finish(counters_ptr, 2 * groups * tiles, groups, num_batches_tracked_ptr, TRACK)


@triton.jit(do_not_specialize=RUNTIME)
def forward_owner_kernel(
    # outputs: x's shape, then [C]
    y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # inputs: x's shape, x's shape, [C], [C]
    partials_ptr, counters_ptr,  # unused, [2 + groups]
    momentum, momentum_tail, eps, eps_tail,
    N, C, S, x_stride_n, x_stride_c, x_stride_s, groups, tiles, lag,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr,
    UPDATE_MEAN: tl.constexpr, UPDATE_VAR: tl.constexpr, TRACK: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    channels = C * C_ALIGN
    BLOCK: tl.constexpr = BLOCK_V * VEC
    group = tl.program_id(0)
    count = (N.to(tl.int64) * S * VEC).to(WIDE)
    pivot = tl.zeros([BLOCK_C], WIDE)
    shift = tl.zeros([BLOCK_C], WIDE)
    m2 = tl.zeros([BLOCK_C], WIDE)
    seen = count * 0
    for tile in range(0, tiles):
        x_offset, y_offset, mask = tile_offsets(
            group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
            BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
        )  # fmt: skip
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
        size = tile_size(tile, N, S, VEC, BLOCK, WIDE)
        tile_mean, tile_m2 = tile_statistics(x, mask, size)
        # Chan's merge
        share = size / (seen + size)
        # the mean as its distance from the first tile's: a large mean would round at every merge
        pivot = tl.where(seen == 0, tl.where(tile_mean - tile_mean == 0, tile_mean, 0.0), pivot)
        value = tile_mean - pivot
        # from an infinite mean there is no difference: it must stay infinite, not become NaN
        delta = tl.where(shift - shift == 0, value - shift, value)
        merged = tl.where(seen == 0, value, shift + delta * share)
        shift = tl.where(shift - shift == 0, merged, shift + value)
        m2 += tl.where(seen == 0, tile_m2, tile_m2 + delta * delta * (seen * share))
        seen += size
    mean = pivot + shift
    var = m2 / count
    rstd = tl.full([BLOCK_C], 1.0, WIDE)
    if not CENTER_ONLY:
        rstd = 1.0 / tl.sqrt(var + exact(eps, eps_tail, WIDE))
    store_statistics(
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, num_batches_tracked_ptr,
        mean, var, rstd, group, channels, count, momentum, momentum_tail,
        CENTER_ONLY, UPDATE_MEAN, UPDATE_VAR, TRACK, CUMULATIVE, BLOCK_C, WIDE,
    )  # fmt: skip
    scale, bias = affine(
        weight_ptr, bias_ptr, rstd, group, channels, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE
    )
    for back in range(0, tiles):
        x_offset, y_offset, mask = tile_offsets(  # in reverse: the last tile read is still close by
            group, tiles - 1 - back, N, C, S, x_stride_n, x_stride_c, x_stride_s,
            BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
        )  # fmt: skip
        normalize_tile(
            y_ptr,
            x_ptr,
            residual_ptr,
            mean,
            scale,
            bias,
            x_offset,
            y_offset,
            mask,
            VALUE,
            HAS_RESIDUAL,
            WIDE,
        )
    if TRACK:
        finish(counters_ptr, groups, groups, num_batches_tracked_ptr, TRACK)


@triton.jit(do_not_specialize=RUNTIME)
def forward_running_kernel(
    y_ptr, mean_ptr, rstd_ptr,  # outputs: x's shape, [C], [C]
    # inputs: x's shape twice, then [C]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,
    eps, eps_tail, N, C, S, x_stride_n, x_stride_c, x_stride_s, tiles,
    VALUE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTER_ONLY: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Normalise with running statistics: nothing to wait for."""
    channels = C * C_ALIGN
    index = tl.program_id(0)
    group = index // tiles
    tile = index - group * tiles
    mean = per_channel(running_mean_ptr, group, channels, BLOCK_C, WIDE)
    rstd = tl.full([BLOCK_C], 1.0, WIDE)
    if not CENTER_ONLY:
        var = per_channel(running_var_ptr, group, channels, BLOCK_C, WIDE)
        rstd = 1.0 / tl.sqrt(var + exact(eps, eps_tail, WIDE))
        if tile == 0:
            c = group * BLOCK_C + tl.arange(0, BLOCK_C)
            tl.store(mean_ptr + c, mean, mask=c < channels)
            tl.store(rstd_ptr + c, rstd, mask=c < channels)
    scale, bias = affine(
        weight_ptr, bias_ptr, rstd, group, channels, HAS_WEIGHT, HAS_BIAS, BLOCK_C, WIDE
    )
    x_offset, y_offset, mask = tile_offsets(
        group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
        BLOCK_C, BLOCK_V, VEC, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, LONG,
    )  # fmt: skip
    normalize_tile(
        y_ptr,
        x_ptr,
        residual_ptr,
        mean,
        scale,
        bias,
        x_offset,
        y_offset,
        mask,
        VALUE,
        HAS_RESIDUAL,
        WIDE,
    )
