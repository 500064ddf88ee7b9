"""How batch norm's kernels cut a tensor: closed-form, from shape and strides, in this one place."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor

from fastnorm import layout
from fastnorm.ops.launch import processors

TILE_BYTES = (
    16384  # of all the operands of one tile; several tiles per multiprocessor are in flight
)
OWNER_TILES = (
    4  # up to this many tiles, one program owns its channels from the first read to the last write
)
GROUP_BYTES = 1024  # the shortest contiguous run worth reading in NCHW
LINE_BYTES = 128  # of channels, in channels_last


class Plan(NamedTuple):
    """Runtime sizes, then what the kernel is compiled for. Nothing of the latter depends on N, the
    batch."""

    N: int
    C: int  # in units of C_ALIGN
    S: int  # in units of VEC
    x_stride_n: int  # the strides that are not 1 are in units of X_ALIGN
    x_stride_c: int
    x_stride_s: int
    groups: int
    tiles: int  # of one group
    lag: int  # tiles by which normalising stays behind the statistics, beyond a group
    owner: bool
    constants: dict[str, int | bool]


def plan(x: Tensor, y: Tensor, operands: int) -> Plan:
    """Cut x (any strides that layout.to_planes leaves) and y (dense, layout.planes_like) into
    tiles."""
    view = layout.planes(x)
    assert view is not None
    out = layout.planes(y)
    assert out is not None
    strides = (*view.stride(), out.stride(1))
    return _plan(
        tuple(view.shape),
        strides,
        x.element_size(),
        TILE_BYTES,
        operands,
        OWNER_TILES,
        processors(x.get_device()),
    )


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    itemsize: int,
    tile_bytes: int,
    operands: int,
    owner_tiles: int,
    sms: int,
) -> Plan:
    N, C, S = shape
    # the stride of a dimension of one element says nothing
    sn, sc, ss = (step if size > 1 else 0 for size, step in zip(shape, strides, strict=False))
    out_sc = strides[3] if C > 1 else 0
    x_last = C > 1 and sc == 1 and ss != 1
    y_last = C > 1 and out_sc == 1
    if x_last and y_last and (N == 1 or sn == S * ss or S == 1):  # one row-major [N * S, C] matrix
        ss = C if N * S == 1 else sn if S == 1 else ss
        N, S, sn = 1, N * S, 0
    lanes = 16 // itemsize
    vec = math.gcd(S, lanes) if not (x_last and y_last) else 1
    c_align = math.gcd(C, lanes) if x_last or y_last else 1
    steps = (sn, ss) if x_last else (sn, sc)
    x_align = math.gcd(lanes, *steps)
    if x_last or y_last:
        block_c = _power_of_two(LINE_BYTES // itemsize)
    else:
        block_c = _power_of_two(max(1, GROUP_BYTES // (S * itemsize)))
    share = tile_bytes // operands
    if x_last != y_last:  # transposed through shared memory: a full tile spills
        share = min(share, tile_bytes // 2)
    if not (x_last or y_last):  # short vectors need an offset each: a full tile of them spills
        share = max(share * vec // lanes, share // 4)
    elements = max(_power_of_two(share // itemsize + 1) // 2, 2 * vec)
    block_c = min(block_c, _power_of_two(C), 64, elements // vec)
    block_v = max(elements // block_c // vec, 1)
    groups = -(-C // block_c)
    tiles = -(-N * S // (block_v * vec))
    extent = max(N * sn + S * ss + C * sc, N * C * S) + elements
    return Plan(
        N=N,
        C=C // c_align,
        S=S // vec,
        x_stride_n=sn // x_align,
        x_stride_c=sc if x_last else sc // x_align,
        x_stride_s=ss // x_align if x_last else ss,
        groups=groups,
        tiles=tiles,
        lag=2 * sms,
        owner=tiles <= owner_tiles,
        constants={
            "BLOCK_C": block_c,
            "BLOCK_V": block_v,
            "VEC": vec,
            "C_ALIGN": c_align,
            "X_ALIGN": x_align,
            "X_LAST": x_last,
            "Y_LAST": y_last,
            "LONG": extent >= 2**31,
        },
    )


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
