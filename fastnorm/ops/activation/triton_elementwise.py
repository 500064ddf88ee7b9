"""Elementwise kernels: 16 bytes per thread and load, four loads in flight, whole blocks without a
mask.

A mask whose edge is not a multiple of the vector would cut every access of the kernel into scalars;
so the last, partial block takes a branch of its own, uniform over the program, and every other
block is loaded in full. Of a small tensor a block is a quarter, one load: a branch too, for a
constant would compile the kernel once more for another batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_block(y_ptr, x_ptr, numel, VALUE: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SIZE
    left = numel - start
    i = tl.arange(0, SIZE)
    if left >= SIZE:
        x = tl.load(x_ptr + start + i).to(WIDE)
        tl.store(y_ptr + start + i, VALUE(x))
    else:
        x = tl.load(x_ptr + start + i, mask=i < left, other=0.0).to(WIDE)
        tl.store(y_ptr + start + i, VALUE(x), mask=i < left)


@triton.jit
def backward_block(
    dx_ptr, x_ptr, dy_ptr, numel, SLOPE: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    left = numel - start
    i = tl.arange(0, SIZE)
    if left >= SIZE:
        x = tl.load(x_ptr + start + i).to(WIDE)
        dy = tl.load(dy_ptr + start + i).to(WIDE)
        tl.store(dx_ptr + start + i, dy * SLOPE(x))
    else:
        x = tl.load(x_ptr + start + i, mask=i < left, other=0.0).to(WIDE)
        dy = tl.load(dy_ptr + start + i, mask=i < left, other=0.0).to(WIDE)
        tl.store(dx_ptr + start + i, dy * SLOPE(x), mask=i < left)


@triton.jit(do_not_specialize=["numel", "small"])
def forward_kernel(
    y_ptr,  # output [numel]
    x_ptr,  # input [numel]
    numel, small,
    VALUE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if small:
        forward_block(y_ptr, x_ptr, numel, VALUE, WIDE, BLOCK // 4)
    else:
        forward_block(y_ptr, x_ptr, numel, VALUE, WIDE, BLOCK)


@triton.jit(do_not_specialize=["numel", "small"])
def backward_kernel(
    dx_ptr,  # output [numel]
    x_ptr, dy_ptr,  # inputs [numel]
    numel, small,
    SLOPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if small:
        backward_block(dx_ptr, x_ptr, dy_ptr, numel, SLOPE, WIDE, BLOCK // 4)
    else:
        backward_block(dx_ptr, x_ptr, dy_ptr, numel, SLOPE, WIDE, BLOCK)
