"""Batch norm in Triton, each direction in one launch: x is read from memory once, the second read
comes from L2 as far as L2 can hold it.

A tile is [BLOCK_C, BLOCK_V, VEC]: BLOCK_C lanes by BLOCK_V * VEC positions. A lane is a channel,
and VEC adjacent positions are a 16-byte access. In rows adjacent lanes are: there a tile is
[BLOCK_C, BLOCK_V, 1], and a thread has VEC of its rows. Planes that are no whole vectors are rows
too: their CHANNELS are fewer than the lanes, each of which is one position of one of them.

The channels of a tile are a group, a program's run of a group's tiles its share. All shares of a
group must be reduced before the first of them is normalised. Two forms:

owner   one program has the whole group, and goes through it twice.
ticket  every program draws a ticket, and tickets hand out the shares to reduce and, behind them,
        those to normalise. The last program to reduce a share of a group merges all of them, the
        others' in fixed order, and releases those that wait to normalise. They wait only for
        smaller tickets, which are running or done: no deadlock on any grid, under preemption,
        beside other streams.
"""

from __future__ import annotations

import triton
import triton.language as tl

# sizes that must not become part of a compile key
RUNTIME = [
    "N",
    "C",
    "S",
    "x_stride_n",
    "x_stride_c",
    "x_stride_s",
    "magic",
    "shift",
    "width",
    "count",
    "tiles",
    "run",
    "groups",
    "together",
    "lag",
    "momentum",
    "momentum_tail",
    "eps",
    "eps_tail",
]


@triton.jit
def quotient(i, divisor, magic, shift, LONG: tl.constexpr):
    """i / divisor, for i below 2^31 as a multiplication (plan.py)."""
    if LONG:
        return i // divisor
    else:
        return (tl.umulhi((2 * i).to(tl.uint32), magic.to(tl.uint32)) >> shift).to(tl.int32)


@triton.jit
def tile_offsets(
    group, tile, at,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr, CHANNELS: tl.constexpr,
    C_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile in x and in y, [BLOCK_C, BLOCK_V, VEC], and its mask, [BLOCK_C, BLOCK_V,
    1]; in rows all of them [BLOCK_C, BLOCK_V, 1]."""
    N, C, S, x_stride_n, x_stride_c, x_stride_s, magic, shift, width = at
    if LONG:
        group = group.to(tl.int64)
        tile = tl.cast(tile, tl.int64)
        N = N.to(tl.int64)
        S = S.to(tl.int64)
        x_stride_n = x_stride_n.to(tl.int64)  # in units: the stride itself may not fit 32 bits
        x_stride_c = x_stride_c.to(tl.int64)
        x_stride_s = x_stride_s.to(tl.int64)
    columns = C * C_ALIGN
    lane = tl.arange(0, BLOCK_C)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    if CHANNELS < BLOCK_C:
        c = group * (width * C_ALIGN) + lane
        there = (lane < width * C_ALIGN) & (c < columns)
    else:
        c = group * BLOCK_C + lane
        there = c < columns
    c = c[:, None, None]
    if ROWS:
        row = v[None, :, None]
        mask = there[:, None, None] & (row < N * S)
        x_offset = row * (x_stride_s * X_ALIGN) + c
        y_offset = row * columns + c
    else:
        mask = there[:, None, None] & (v < N * S)[None, :, None]
        n = quotient(v, S, magic, shift, LONG)
        s = ((v - n * S) * VEC)[None, :, None] + tl.arange(0, VEC)[None, None, :]
        n = n[None, :, None]
        if X_LAST:
            x_offset = n * (x_stride_n * X_ALIGN) + s * (x_stride_s * X_ALIGN) + c
        else:
            x_offset = n * (x_stride_n * X_ALIGN) + c * (x_stride_c * X_ALIGN) + s
        positions = S * VEC
        if Y_LAST:
            y_offset = (n * positions + s) * columns + c
        else:
            y_offset = (n * columns + c) * positions + s
    return x_offset, y_offset, mask


@triton.jit
def fold(t, VEC: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr, ROWS: tl.constexpr):
    """Sums over those positions of a tile that one thread holds: threads meet after the last tile
    only. Where a tile changes from one layout to another there are none: t itself."""
    if ROWS:  # a thread's rows are as far from each other as they can be
        t = tl.sum(tl.reshape(t, [t.shape[0], VEC, t.shape[1] // VEC]), axis=1, keep_dims=True)
    elif not (X_LAST or Y_LAST):
        t = tl.sum(t, axis=2, keep_dims=True)
    return t


@triton.jit
def fold_masked(
    t, mask, VEC: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr, ROWS: tl.constexpr
):
    """The same, of what is not masked. In planes a mask has no VEC: it can wait for the sum."""
    if ROWS:
        return fold(tl.where(mask, t, 0.0), VEC, X_LAST, Y_LAST, ROWS)
    else:
        return tl.where(mask, fold(t, VEC, X_LAST, Y_LAST, ROWS), 0.0)


@triton.jit
def total(t):
    """Sum over all positions: [BLOCK_C]."""
    return tl.sum(tl.sum(t, axis=2), axis=1)


@triton.jit
def channel_count(at, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr, C_ALIGN: tl.constexpr):
    """(all channels, positions of a channel in one row)."""
    _, C, _, _, _, _, _, _, width = at
    channels = C * C_ALIGN
    plane = 1
    if CHANNELS < BLOCK_C:
        plane = width * C_ALIGN // CHANNELS
        channels = channels // plane
    return channels, plane


@triton.jit
def lane_channels(group, at, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr, C_ALIGN: tl.constexpr):
    """(the channel of each lane within its group, the channel, whether there is one)."""
    channels, plane = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)
    within = tl.arange(0, BLOCK_C)
    if CHANNELS < BLOCK_C:
        within = within // plane
    c = group * CHANNELS + within
    return within, c, (within < CHANNELS) & (c < channels)


@triton.jit
def to_channels(t, at, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr, C_ALIGN: tl.constexpr):
    """Sums of lanes, [BLOCK_C], as sums of channels, [CHANNELS]."""
    if CHANNELS < BLOCK_C:
        PLANE: tl.constexpr = BLOCK_C // CHANNELS  # the next power of two
        plane = channel_count(at, BLOCK_C, CHANNELS, C_ALIGN)[1]
        i = tl.arange(0, BLOCK_C)
        s = i % PLANE
        lane = tl.where(s < plane, i // PLANE * plane + s, 0)
        t = tl.where(s < plane, tl.gather(t, lane, 0), 0.0)
        t = tl.sum(tl.reshape(t, [CHANNELS, PLANE]), axis=1)
    return t


@triton.jit
def to_lanes(t, at, BLOCK_C: tl.constexpr, CHANNELS: tl.constexpr, C_ALIGN: tl.constexpr):
    """A value of each channel, [CHANNELS], at each of its lanes, [BLOCK_C]."""
    if CHANNELS < BLOCK_C:
        within, _, _ = lane_channels(0, at, BLOCK_C, CHANNELS, C_ALIGN)
        t = tl.gather(t, tl.minimum(within, CHANNELS - 1), 0)
    return t


@triton.jit
def exact(head, tail, WIDE: tl.constexpr):
    """A number that came as two fp32 ones: fp64 kernels need more than Triton's scalars carry."""
    return tl.full([], head, WIDE) + tl.full([], tail, WIDE)


@triton.jit
def per_channel(ptr, c, there, WIDE: tl.constexpr):
    return tl.load(ptr + c, mask=there, other=0.0).to(WIDE)


@triton.jit
def affine(
    weight_ptr, bias_ptr, rstd, c, there,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(scale, bias) per channel, so that the pre-activation is (x - mean) * scale + bias."""
    scale = rstd
    if HAS_WEIGHT:
        scale = rstd * per_channel(weight_ptr, c, there, WIDE)
    bias = tl.zeros_like(rstd)
    if HAS_BIAS:
        bias = per_channel(bias_ptr, c, there, WIDE)
    return scale, bias


@triton.jit
def share_tiles(share, tiles, run):
    """(first tile, number of tiles) of a share."""
    first = share * run
    return first, tl.minimum(run, tiles - first)


@triton.jit
def ticket_share(ticket, groups, shares, together, lag):
    """(whether a ticket stands for a share to reduce, its group, the share).

    `together` neighbouring groups are a set and take turns; sets follow each other. Shares of two
    sets are reduced and normalised in turns, or, where L2 cannot hold a group, a set is reduced
    and then normalised from its end: what was read last is still there.
    """
    count = groups * shares
    whole = together * shares
    # in turns
    delay = tl.minimum(whole + lag, count)
    step = ticket - delay
    alternate = ticket < 2 * count - delay
    reduces = (ticket < delay) | (alternate & (step % 2 == 0))
    reduce_index = tl.where(ticket < delay, ticket, delay + step // 2)
    index = tl.where(reduces, reduce_index, tl.where(alternate, step // 2, ticket - count))
    # in phases
    phases = lag < 0
    begin = ticket // (2 * whole) * whole
    size = tl.minimum(count - begin, whole)
    past = ticket - 2 * begin
    reduces = tl.where(phases, past < size, reduces)
    index = tl.where(phases, begin + tl.where(reduces, past, 2 * size - 1 - past), index)
    first = index // whole * together
    width = tl.minimum(groups - first, together)
    place = index - first * shares
    share = place // width
    return reduces, first + place - share * width, share


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
def passed(counter):
    """Count a program that has nothing to publish; returns how many came before."""
    return tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def leave_zero(counters_ptr, groups, num_batches_tracked_ptr, TRACK: tl.constexpr):
    """The last program that reads a counter leaves all of them zero and counts the batch."""
    for start in range(0, groups + 2, 1024):
        i = start + tl.arange(0, 1024)
        tl.store(counters_ptr + i, tl.zeros([1024], tl.int32), mask=i < groups + 2)
    if TRACK:
        tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)
