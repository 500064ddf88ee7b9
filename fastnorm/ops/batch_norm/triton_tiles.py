"""Batch norm in Triton, each direction in one launch: x is read from memory once, the second read
comes from L2.

A tile is [BLOCK_C, BLOCK_V, VEC]: BLOCK_C channels by BLOCK_V * VEC positions, VEC adjacent ones a
16-byte access. The channels of a tile are a group; a group's tiles must all be reduced before the
first of them is normalised. Two forms:

owner   one program loops over all tiles of its group, twice.
ticket  every program draws a ticket, and tickets hand out the statistics tiles of all groups
        interleaved with the normalising tiles of a group that is complete but for stragglers, for
        which the program waits. It waits only for smaller tickets, which are running or done: no
        deadlock on any grid, under preemption, beside other streams.
"""

from __future__ import annotations

import triton
import triton.language as tl

MERGE = tl.constexpr(256)  # partials merged at a time, over all channels of a group

# sizes that must not become part of a compile key
RUNTIME = [
    "N",
    "C",
    "S",
    "x_stride_n",
    "x_stride_c",
    "x_stride_s",
    "groups",
    "tiles",
    "lag",
    "momentum",
    "momentum_tail",
    "eps",
    "eps_tail",
]


@triton.jit
def tile_offsets(
    group, tile, N, C, S, x_stride_n, x_stride_c, x_stride_s,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, C_ALIGN: tl.constexpr,
    X_ALIGN: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile in x and in y, and its mask: [BLOCK_C, BLOCK_V, VEC] each."""
    if LONG:
        group = group.to(tl.int64)
        tile = tl.cast(tile, tl.int64)
        N = N.to(tl.int64)
        S = S.to(tl.int64)
        x_stride_n = x_stride_n.to(tl.int64)  # in units: the stride itself may not fit 32 bits
        x_stride_c = x_stride_c.to(tl.int64)
        x_stride_s = x_stride_s.to(tl.int64)
    channels = C * C_ALIGN
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    n = v // S
    s = ((v - n * S) * VEC)[None, :, None] + tl.arange(0, VEC)[None, None, :]
    mask = (c < channels)[:, None, None] & (v < N * S)[None, :, None]
    n = n[None, :, None]
    c = c[:, None, None]
    if X_LAST:
        x_offset = n * (x_stride_n * X_ALIGN) + s * (x_stride_s * X_ALIGN) + c
    else:
        x_offset = n * (x_stride_n * X_ALIGN) + c * (x_stride_c * X_ALIGN) + s
    positions = S * VEC
    if Y_LAST:
        y_offset = (n * positions + s) * channels + c
    else:
        y_offset = (n * channels + c) * positions + s
    return x_offset, y_offset, mask


@triton.jit
def exact(head, tail, WIDE: tl.constexpr):
    """A number that came as two fp32 ones: fp64 kernels need more than Triton's scalars carry."""
    return tl.full([], head, WIDE) + tl.full([], tail, WIDE)


@triton.jit
def total(t):
    """Sum over the positions of a tile: [BLOCK_C]."""
    return tl.sum(tl.sum(t, axis=2), axis=1)


@triton.jit
def per_channel(ptr, group, C, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.load(ptr + c, mask=c < C, other=0.0).to(WIDE)


@triton.jit
def ticket_tile(ticket, groups, tiles, lag):
    """Which tile a ticket stands for: (whether it is a statistics tile, its index in order of
    groups)."""
    count = groups * tiles
    delay = tl.minimum(tiles + lag, count)
    step = ticket - delay
    pair = step // 2
    alternate = ticket < 2 * count - delay
    reduces = (ticket < delay) | (alternate & (step % 2 == 0))
    reduce_index = tl.where(ticket < delay, ticket, delay + pair)
    apply_index = tl.where(alternate, pair, ticket - count)
    return reduces, tl.where(reduces, reduce_index, apply_index)


@triton.jit
def arrive(counter):
    """Publish what this program has stored; returns how many had arrived before."""
    tl.debug_barrier()  # the stores of all its threads come before the one thread's release
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def wait(counter, arrivals):
    while tl.atomic_add(counter, 0, sem="acquire") < arrivals:
        pass


@triton.jit
def finish(counters_ptr, programs, groups, num_batches_tracked_ptr, TRACK: tl.constexpr):
    """The last program to finish leaves every counter zero and counts the batch."""
    if arrive(counters_ptr + 1) == programs - 1:
        for start in range(0, groups + 2, 1024):
            i = start + tl.arange(0, 1024)
            tl.store(counters_ptr + i, tl.zeros([1024], tl.int32), mask=i < groups + 2)
        if TRACK:
            tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)


@triton.jit
def store_partials(ptr, group, tile, tiles, first, second, BLOCK_C: tl.constexpr):
    """Workspace [groups, 2, BLOCK_C, tiles]."""
    i = (tl.cast(group, tl.int64) * 2 * BLOCK_C + tl.arange(0, BLOCK_C)) * tiles + tile
    tl.store(ptr + i, first)
    tl.store(ptr + i + BLOCK_C * tiles, second)


@triton.jit
def load_partials(ptr, group, start, tiles, WHICH: tl.constexpr, BLOCK_C: tl.constexpr):
    t = start + tl.arange(0, MERGE // BLOCK_C)
    c = (tl.cast(group, tl.int64) * 2 + WHICH) * BLOCK_C + tl.arange(0, BLOCK_C)
    # past L1, which another multiprocessor's stores do not reach
    return tl.load(
        ptr + c[:, None] * tiles + t[None, :],
        mask=(t < tiles)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )


@triton.jit
def tile_statistics(x, mask, size):
    """(mean, sum of squared deviations) of a tile's `size` positions per channel, in two passes
    over registers."""
    mean = total(tl.where(mask, x, 0.0)) / size
    deviation = tl.where(mask, x - mean[:, None, None], 0.0)
    return mean, total(deviation * deviation)


@triton.jit
def tile_size(tile, N, S, VEC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """How many positions each of the tiles holds; none where it lies past the end."""
    positions = N.to(tl.int64) * S * VEC
    return tl.maximum(tl.minimum(positions - tl.cast(tile, tl.int64) * BLOCK, BLOCK), 0).to(WIDE)


@triton.jit
def merge_statistics(
    ptr,
    group,
    tiles,
    N,
    S,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(mean, variance) of a group from its tiles', in fixed order (Chan, Golub & LeVeque 1979)."""
    count = (N.to(tl.int64) * S * VEC).to(WIDE)
    first = tl.load(
        ptr + (tl.cast(group, tl.int64) * 2 * BLOCK_C + tl.arange(0, BLOCK_C)) * tiles,
        cache_modifier=".cg",
    )
    # an infinite mean must stay infinite, not become NaN
    pivot = tl.where(first - first == 0, first, 0.0)
    shift = tl.zeros([BLOCK_C, MERGE // BLOCK_C], WIDE)
    for start in range(0, tiles, MERGE // BLOCK_C):
        means = load_partials(ptr, group, start, tiles, 0, BLOCK_C)
        size = tile_size(start + tl.arange(0, MERGE // BLOCK_C), N, S, VEC, BLOCK, WIDE)[None, :]
        shift += tl.where(size > 0, size * (means - pivot[:, None]), 0.0)
    mean = pivot + tl.sum(shift, axis=1) / count
    m2 = tl.zeros([BLOCK_C, MERGE // BLOCK_C], WIDE)
    for start in range(0, tiles, MERGE // BLOCK_C):
        deviation = load_partials(ptr, group, start, tiles, 0, BLOCK_C) - mean[:, None]
        size = tile_size(start + tl.arange(0, MERGE // BLOCK_C), N, S, VEC, BLOCK, WIDE)[None, :]
        within = load_partials(ptr, group, start, tiles, 1, BLOCK_C)
        m2 += tl.where(size > 0, within + size * deviation * deviation, 0.0)
    return mean, tl.sum(m2, axis=1) / count


@triton.jit
def merge_sums(ptr, group, tiles, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Both sums of a group from its tiles', in fixed order."""
    first = tl.zeros([BLOCK_C, MERGE // BLOCK_C], WIDE)
    second = tl.zeros([BLOCK_C, MERGE // BLOCK_C], WIDE)
    for start in range(0, tiles, MERGE // BLOCK_C):
        first += load_partials(ptr, group, start, tiles, 0, BLOCK_C)
        second += load_partials(ptr, group, start, tiles, 1, BLOCK_C)
    return tl.sum(first, axis=1), tl.sum(second, axis=1)


@triton.jit
def affine(
    weight_ptr, bias_ptr, rstd, group, C,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(scale, bias) per channel, so that the pre-activation is (x - mean) * scale + bias."""
    scale = rstd
    if HAS_WEIGHT:
        scale = rstd * per_channel(weight_ptr, group, C, BLOCK_C, WIDE)
    bias = tl.zeros([BLOCK_C], WIDE)
    if HAS_BIAS:
        bias = per_channel(bias_ptr, group, C, BLOCK_C, WIDE)
    return scale, bias
