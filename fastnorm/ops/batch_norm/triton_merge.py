"""The sums and moments of a group from those of its shares, and a share's own.

The last of FAN neighbouring shares to arrive merges them, the last of these to arrive merges theirs
and has the group's: in fixed order, whoever comes last, and never more at a time than one load of
all threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnorm.ops.batch_norm.triton_tiles import (
    arrive,
    channel_count,
    fold,
    fold_masked,
    tile_offsets,
    to_channels,
    to_lanes,
    total,
    wait,
)

MERGE = tl.constexpr(4096)  # partials merged at a time, over all channels of a group,
FAN = tl.constexpr(256)  # and of at most so many shares


@triton.jit
def finite(t):
    """t, or 0 where it is none: an infinite mean must stay infinite, not become NaN."""
    return tl.where(t - t == 0, t, 0.0)


@triton.jit
def fan(shares, CHANNELS: tl.constexpr):
    """(how many shares are merged at a time, how often that is done in a group)."""
    ROWS: tl.constexpr = min(MERGE // CHANNELS, FAN)
    return ROWS, tl.cdiv(shares, ROWS)


@triton.jit
def partials(ptr, group, row, shares, CHANNELS: tl.constexpr):
    """Where two numbers per channel lie in the workspace [groups, shares + fans + 1, 2, CHANNELS]:
    those of shares, then those of fans, then the group's own."""
    rows = shares + fan(shares, CHANNELS)[1] + 1
    start = ptr + tl.cast(group, tl.int64) * rows * (2 * CHANNELS)
    return start + row * (2 * CHANNELS)


@triton.jit
def store_partials(ptr, group, row, shares, first, second, CHANNELS: tl.constexpr):
    at = partials(ptr, group, row, shares, CHANNELS) + tl.arange(0, CHANNELS)
    tl.store(at, first)
    tl.store(at + CHANNELS, second)


@triton.jit
def settle(ptr, counters_ptr, group, shares, first, second, CHANNELS: tl.constexpr):
    """Publish a group's own two numbers."""
    own = shares + fan(shares, CHANNELS)[1]
    store_partials(ptr, group, own, shares, first, second, CHANNELS)
    arrive(counters_ptr + group)


@triton.jit
def settled(ptr, counters_ptr, group, shares, within, there, CHANNELS: tl.constexpr):
    """Wait for a group's own two numbers: one for each lane."""
    fans = fan(shares, CHANNELS)[1]
    wait(counters_ptr + group, tl.where(fans > 1, fans + 1, 1))
    at = partials(ptr, group, shares + fans, shares, CHANNELS) + within
    # past L1, which another multiprocessor's stores do not reach
    first = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    return first, tl.load(at + CHANNELS, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def share_size(share, shares, count, run, plane, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Positions of a channel in a share, [] or [rows, 1]: only the last has fewer, and none where
    there is no such share."""
    whole = tl.cast(run, tl.int64) * BLOCK * plane
    last = (count - (shares - 1) * whole).to(WIDE)
    return tl.where(share < shares - 1, whole.to(WIDE), tl.where(share < shares, last, 0.0))


@triton.jit
def merge_rows(
    ptr, group, start, begin, rows, number, shares, count, run, plane,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Up to fan() rows of the workspace as one, from number `begin` of the `number` behind `start`:
    both sums, or mean and sum of squared deviations (Chan, Golub & LeVeque 1979)."""
    ROWS: tl.constexpr = min(MERGE // CHANNELS, FAN)
    row = tl.arange(0, ROWS)[:, None]
    at = partials(ptr, group, start + begin + row, shares, CHANNELS)
    at += tl.arange(0, CHANNELS)[None, :]
    first = tl.load(at, mask=row < rows, other=0.0, cache_modifier=".cg")
    second = tl.load(at + CHANNELS, mask=row < rows, other=0.0, cache_modifier=".cg")
    if MOMENTS:
        size = share_size(begin + row, number, count, run, plane, BLOCK, WIDE)
        size = tl.where(row < rows, size, 0.0)
        positions = tl.sum(size, axis=0)
        pivot = finite(tl.sum(size * first, axis=0) / positions)
        deviation = tl.where(size > 0, first - pivot[None, :], 0.0)
        distance = tl.sum(size * deviation, axis=0)
        squares = tl.sum(second + size * deviation * deviation, axis=0)
        return pivot + distance / positions, squares - distance * distance / positions
    else:
        return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def merge_shares(
    ptr, counters_ptr, group, groups, share, shares, first, second, count, run, plane,
    MOMENTS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(whether this program was the group's last to arrive, then both numbers of the group).

    Counters [groups * (1 + fans)]: of groups, then of fans, which are left zero here."""
    store_partials(ptr, group, share, shares, first, second, CHANNELS)
    width, fans = fan(shares, CHANNELS)
    own = share // width
    begin = own * width
    rows = tl.minimum(width, shares - begin)
    counter = counters_ptr + groups + group * fans + own
    last = arrive(counter) == rows - 1
    if last:
        tl.store(counter, 0)
        first, second = merge_rows(
            ptr, group, 0, begin, rows, shares, shares, count, run, plane,
            MOMENTS, BLOCK, CHANNELS, WIDE,
        )  # fmt: skip
        if fans > 1:
            store_partials(ptr, group, shares + own, shares, first, second, CHANNELS)
            last = arrive(counters_ptr + group) == fans - 1
            if last:  # every fan but the last is of `width` shares
                first, second = merge_rows(
                    ptr, group, shares, 0, fans, fans, shares, count, run * width, plane,
                    MOMENTS, BLOCK, CHANNELS, WIDE,
                )  # fmt: skip
    return last, first, second


@triton.jit
def share_statistics(
    x_ptr, group, first, length, size, at,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squared deviations) of `length` tiles' `size` positions: [CHANNELS] each.

    Deviations are from the mean of the first tile, which is no further from that of all tiles than
    the root of their number times the standard deviation (Cauchy-Schwarz): nothing cancels.
    """
    plane = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)[1]
    count = size / plane  # of a lane
    x_offset, _, mask = tile_offsets(
        group, first, at,
        BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
    )  # fmt: skip
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
    values = total(fold(x, VEC, X_LAST, Y_LAST, ROWS))
    pivot = finite(values / tl.minimum(count, BLOCK_V if ROWS else BLOCK_V * VEC))
    deviation = x - pivot[:, None, None]
    shift = fold_masked(deviation, mask, VEC, X_LAST, Y_LAST, ROWS)
    m2 = fold_masked(deviation * deviation, mask, VEC, X_LAST, Y_LAST, ROWS)
    for tile in range(first + 1, first + length):
        x_offset, _, mask = tile_offsets(
            group, tile, at,
            BLOCK_C, BLOCK_V, VEC, CHANNELS, C_ALIGN, X_ALIGN, X_LAST, Y_LAST, ROWS, LONG,
        )  # fmt: skip
        x = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(WIDE)
        deviation = x - pivot[:, None, None]
        if ROWS:
            deviation = tl.where(mask, deviation, 0.0)
            shift += fold(deviation, VEC, X_LAST, Y_LAST, ROWS)
            m2 += fold(deviation * deviation, VEC, X_LAST, Y_LAST, ROWS)
        else:
            shift += fold_masked(deviation, mask, VEC, X_LAST, Y_LAST, ROWS)
            m2 += fold_masked(deviation * deviation, mask, VEC, X_LAST, Y_LAST, ROWS)
    distance = total(shift)
    squares = total(m2) - distance * distance / count
    mean = pivot + distance / count
    if CHANNELS < BLOCK_C:
        lane_mean = mean
        mean = to_channels(lane_mean, at, BLOCK_C, CHANNELS, C_ALIGN) / plane
        distance = lane_mean - to_lanes(finite(mean), at, BLOCK_C, CHANNELS, C_ALIGN)
        squares = to_channels(squares + count * distance * distance, at, BLOCK_C, CHANNELS, C_ALIGN)
    return mean, tl.where(squares < 0, 0.0, squares)
