"""How batch norm's Triton kernels cut a tensor: closed-form, from shape and strides, in this one
place."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor

from fastnorm import layout
from fastnorm.ops.launch import l2_bytes, processors

TILE_BYTES = (
    16384  # of all the operands of one tile; several tiles per multiprocessor are in flight
)
OWNER_TILES = (
    4  # up to this many tiles, one program owns its channels from the first read to the last write
)
GROUP_BYTES = 1024  # the shortest contiguous run worth reading in NCHW
LINE_BYTES = 128  # of channels, in channels_last; and the shortest run of a narrowed group
RUN_TILES = 4  # of a ticket whose second read comes from L2; half where L2 has little room left
SHARES = 512  # at most so many of a group that L2 holds: one program merges them
PROGRAMS = 8  # for each multiprocessor, where nothing but their number limits a run
LAG = 2  # programs of each multiprocessor by which a ticket's second read stays behind its first
SET_BYTES = 6 << 20  # of neighbouring groups that go together, for longer runs of memory
IN_FLIGHT = 1 << 17  # of L2, for each multiprocessor: what is between its two reads
FLAT = 4096  # the longest run of memory that is read as one row of lanes
THREADS = 256


class Plan(NamedTuple):
    """Runtime sizes, then what the kernel is compiled for. Nothing of the latter depends on N, the
    batch."""

    N: int
    C: int  # columns, in units of C_ALIGN: channels, or positions of all channels in flat rows
    S: int  # in units of VEC, but in rows
    x_stride_n: int  # the strides that are not 1 are in units of X_ALIGN
    x_stride_c: int
    x_stride_s: int
    magic: int  # i // S = high half of (2 * i * magic) >> shift for i below 2^31
    shift: int
    width: int  # columns of a group, in units of C_ALIGN
    positions: int  # of a channel
    tiles: int  # of one group
    run: int  # tiles of one program, in a loop
    groups: int
    together: int  # groups that take turns at tickets
    lag: int  # shares by which normalising stays behind the statistics; negative: in phases
    owner: bool
    constants: dict[str, int | bool]

    @property
    def shares(self) -> int:
        """Programs that share a group, each with a run of its tiles."""
        return -(-self.tiles // self.run)


def plan(x: Tensor, y: Tensor, operands: int, one_pass: bool = False) -> Plan:
    """Cut x (any strides that layout.to_planes leaves) and y (dense, layout.planes_like) into
    tiles, and these into runs; one_pass: nothing waits for the sums of a group."""
    view = layout.planes(x)
    assert view is not None
    out = layout.planes(y)
    assert out is not None
    device = x.get_device()
    return _plan(
        tuple(view.shape),
        (*view.stride(), out.stride(1)),
        x.element_size(),
        operands,
        one_pass,
        _limits(),
        processors(device),
        l2_bytes(device),
    )


def _limits() -> tuple[int, ...]:
    return TILE_BYTES, OWNER_TILES, RUN_TILES, LAG, SHARES, PROGRAMS, SET_BYTES, IN_FLIGHT


class _Cut(NamedTuple):
    """What a tile is: [BLOCK_C columns, BLOCK_V, VEC] of a tensor [N, C, S]."""

    N: int
    C: int
    S: int
    strides: tuple[int, int, int]
    width: int
    plane: int  # positions of a channel that lie in a row
    constants: dict[str, int | bool]


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    operands: int,
    one_pass: bool,
    limits: tuple[int, ...],
    sms: int,
    l2: int,
) -> Plan:
    tile_bytes, owner_tiles, run_tiles, behind, most, programs, set_bytes, in_flight = limits
    cut = _cut(shape, strides, itemsize, operands, tile_bytes, sms)
    N, C, S = cut.N, cut.C, cut.S
    k = cut.constants
    block = k["BLOCK_V"] * (1 if k["ROWS"] else k["VEC"])
    groups = -(-C // cut.width)
    tiles = -(-N * S // block)
    everything = groups * tiles
    group_bytes = math.prod(shape) * itemsize * operands // groups
    owner = not one_pass and tiles <= owner_tiles
    together, lag, run = 1, 0, tiles
    if one_pass:
        run = -(-everything // (programs * sms))
    elif owner:
        pass
    elif group_bytes <= l2 // 8 * 5 - sms * in_flight:
        together = max(min(set_bytes // group_bytes, groups), 1)
        run = run_tiles if group_bytes <= set_bytes else run_tiles // 2
        run = max(min(run, everything // (4 * sms)), -(-tiles // most), 1)
        lag = -(-behind * sms // run)
    else:  # rows are read whole, though a group is a part of each
        together, lag = groups if k["ROWS"] else 1, -1
        run = -(-together * tiles // (programs * sms))
    sn, sc, ss = cut.strides
    c_align, x_align, x_last = k["C_ALIGN"], k["X_ALIGN"], k["X_LAST"]
    steps = S if k["ROWS"] else S // k["VEC"]
    shift = (steps - 1).bit_length()
    magic = -(-(1 << 31 + shift) // steps)
    return Plan(
        N=N,
        C=C // c_align,
        S=steps,
        x_stride_n=sn // x_align,
        x_stride_c=sc if x_last else sc // x_align,
        x_stride_s=ss // x_align if x_last else ss,
        magic=magic - (1 << 32) * (magic >= 1 << 31),  # as a signed number: one type for all
        shift=shift,
        width=cut.width // c_align,
        positions=N * S * cut.plane,
        tiles=tiles,
        run=min(run, tiles),
        groups=groups,
        together=together,
        lag=lag,
        owner=owner,
        constants=k,
    )


def _cut(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    operands: int,
    tile_bytes: int,
    sms: int,
) -> _Cut:
    N, C, S = shape
    # the stride of a dimension of one element says nothing
    sn, sc, ss = (step if size > 1 else 0 for size, step in zip(shape, strides, strict=False))
    out_sc = strides[3] if C > 1 else 0
    x_last = C > 1 and sc == 1 and ss != 1
    y_last = C > 1 and out_sc == 1
    lanes = 16 // itemsize
    vec, plane, channels = math.gcd(S, lanes), 1, 0
    rows = x_last and y_last and (N == 1 or sn == S * ss or S == 1)
    share = tile_bytes // operands
    if rows:  # one row-major [N * S, C] matrix
        ss = C if N * S == 1 else sn if S == 1 else ss
        N, S, sn = 1, N * S, 0
    elif not (x_last or y_last):
        channels = _flat_channels((C, S), (sn, sc), itemsize, sms)
        if channels:  # one row-major [N, C * S] matrix
            rows = x_last = y_last = True
            plane, ss = S, sn if N > 1 else C * S
            N, C, S, sn, sc = 1, C * S, N, 0, 1
    if not rows and (x_last or y_last):  # transposed through shared memory: a full tile spills
        share = min(share, tile_bytes // 2)
    if not (x_last or y_last):  # short vectors need an offset each: a full tile of them spills
        share = max(share * vec // lanes, share // 4)
    elements = max(_power_of_two(share // itemsize + 1) // 2, 2 * vec)
    if channels:
        width = channels * plane
        block_c = _power_of_two(width)
        elements = max(elements, block_c)
    else:
        block_c = _channels(C, S, x_last or y_last, itemsize, sms)
        block_c = width = min(block_c, elements // vec)
    block_v = max(elements // block_c // vec, 1)
    if rows:  # a thread has some of them, and sums these
        block_v = elements // block_c
        vec = max(min(elements // (THREADS * lanes), block_v), 1)
    steps = (sn, ss) if x_last else (sn, sc)
    extent = max(N * sn + S * ss + C * sc, N * C * S) + elements
    constants: dict[str, int | bool] = {
        "BLOCK_C": block_c,
        "BLOCK_V": block_v,
        "VEC": vec,
        "CHANNELS": channels or block_c,
        "C_ALIGN": math.gcd(C, width, lanes) if x_last or y_last else 1,
        "X_ALIGN": math.gcd(lanes, *steps),
        "X_LAST": x_last,
        "Y_LAST": y_last,
        "ROWS": rows,
        "LONG": extent >= 2**31,
    }
    return _Cut(N, C, S, (sn, sc, ss), width, plane, constants)


def _channels(C: int, S: int, last: bool, itemsize: int, sms: int) -> int:
    """Of a group of whole vectors: as many as read memory well, in planes fewer where they would
    leave multiprocessors idle."""
    if last:
        return min(_power_of_two(LINE_BYTES // itemsize), _power_of_two(C))
    found = min(_power_of_two(max(1, GROUP_BYTES // (S * itemsize))), _power_of_two(C), 64)
    while found > 1 and 2 * -(-C // found) <= sms and found * S * itemsize > LINE_BYTES:
        found //= 2
    return found


def _flat_channels(
    sizes: tuple[int, int], strides: tuple[int, int], itemsize: int, sms: int
) -> int:
    """Of a group of planes that are no whole vectors each, but together; 0 where nothing is won."""
    (C, S), (sn, sc), lanes = sizes, strides, 16 // itemsize
    align = math.gcd(C * S, sn, lanes)
    if sc != S or align == math.gcd(S, lanes):
        return 0
    fewest = align // math.gcd(S, align)
    found = max(min(_power_of_two(-(-GROUP_BYTES // (S * itemsize))), 16), fewest)
    while found > fewest and (2 * -(-C // found) <= sms or found * S > FLAT):
        found //= 2
    return found if found * S <= FLAT else 0


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
