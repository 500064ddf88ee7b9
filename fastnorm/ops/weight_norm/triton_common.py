"""What the kernels of weight norm share: phases, forms, and the few operations per norm."""

from __future__ import annotations

import triton
import triton.language as tl

# of a launch: sums and result in one; the sums of a part; the result, from every part's sums
BOTH, SUM, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# columns of a channel: one; several, in one block of columns; more than a block
ONE, SEVERAL, LONG = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def divide(a, b):
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def length_of(norm, EPS: tl.constexpr):
    # eps is constexpr: a float argument would reach an fp64 kernel rounded to fp32
    return norm if EPS is None else tl.where(norm < EPS, tl.full(norm.shape, EPS, norm.dtype), norm)


@triton.jit
def root(squares):
    return tl.sqrt_rn(squares) if squares.dtype == tl.float32 else tl.sqrt(squares)


@triton.jit
def projection(dot, norm, length, EPS: tl.constexpr):
    # what is removed of dw along v, per element of v; nothing where the norm is clamped
    along = divide(divide(dot, length), length)
    return along if EPS is None else tl.where(norm < EPS, tl.zeros_like(along), along)
